"""The snapshot as the page shows it: rows, and cells by key. No I/O.

A cell is a text (`rate`) or an attribute (`spark.rate@points`) that may change each second;
the page holds it under its key, so that it is changed in place. `shape` names everything
else: when it changes, the page has to be made again.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import msgspec

from streamd.webgw import charts
from streamd.webgw.topology import Picture, draw
from streamd.wire import RouteInfo

HISTORY_S = 120
STATES = {
    "running": "running", "ready": "running", "starting": "starting", "recovering": "starting",
    "backoff": "backoff", "stopping": "stopping", "draining": "stopping", "stopped": "stopped",
    "exited": "stopped", "fatal": "fatal", "reloading": "starting",
}  # fmt: skip
RANKS = {"guardian": 0, "master": 1}


class Trend:
    """The numbers of the last two minutes that the snapshot has no history of."""

    def __init__(self) -> None:
        self.points: deque[dict[str, float]] = deque(maxlen=HISTORY_S)

    def add(self, snapshot: Mapping[str, Any]) -> None:
        self.points.append(
            {
                "errors": float(snapshot.get("errors") or 0),
                "dead_letters": float(snapshot.get("dead_letters") or 0),
                "restarts": float(restarts(snapshot)),
            }
        )

    def steps(self, key: str) -> list[float]:
        """What was added each second."""
        values = [point[key] for point in self.points]
        return [max(0.0, after - before) for before, after in pairwise(values)]


class Number(msgspec.Struct, frozen=True):
    """One of the five numbers at the top."""

    key: str
    label: str
    unit: str


class ProcessRow(msgspec.Struct, frozen=True):
    name: str
    branch: str  # "", "└", "├" …
    key: str
    note: str  # last exit, strays


class Row(msgspec.Struct, frozen=True):
    """An agent or a table."""

    name: str
    label: str
    key: str
    group: str
    texts: list[str]
    help: str = ""


class LogLine(msgspec.Struct, frozen=True):
    clock: str
    at: str
    level: str
    text: str


class Overview(msgspec.Struct, frozen=True):
    """All that the page needs."""

    cells: dict[str, str]
    shape: str
    state: str
    numbers: list[Number]
    problems: list[dict[str, Any]]
    processes: list[ProcessRow]
    agents: list[Row]
    tables: list[Row]
    events_log: list[LogLine]
    picture: Picture


NUMBERS = [
    Number("rate", "Events", "a second"),
    Number("behind", "Behind", "events"),
    Number("errors", "Errors", "since the start"),
    Number("dead_letters", "Dead letters", "since the start"),
    Number("restarts", "Restarts", "since the start"),
]


def restarts(snapshot: Mapping[str, Any]) -> int:
    """All restarts of all processes."""
    return sum(int(row.get("restarts") or 0) for row in snapshot.get("processes", ()))


def view_of(
    snapshot: Mapping[str, Any], trend: Trend, routes: Iterable[RouteInfo], now: float
) -> Overview:
    """The page's content at `now` (seconds since the epoch)."""
    cells: dict[str, str] = {}
    state = str(snapshot.get("state", "starting"))
    cells["sentence"] = str(snapshot.get("sentence", ""))
    cells["up"] = charts.span(now - float(snapshot.get("since") or now))
    cells["state@class"] = f"well {state}"
    _numbers(cells, snapshot, trend)
    processes = [
        _process(cells, row, branch, now)
        for row, branch in _tree(snapshot.get("processes", ()))
    ]
    agents = [_agent(cells, row) for row in snapshot.get("agents", ())]
    tables = [_table(cells, row) for row in snapshot.get("tables", ())]
    cells["checkpoint"] = f"{float(snapshot.get('checkpoint_ms') or 0):.1f}\u00a0ms"
    cells["wal"] = charts.size(float(snapshot.get("wal_bytes") or 0))
    problems = list(snapshot.get("problems", ()))
    events_log = [_log_line(event) for event in reversed(snapshot.get("events_log", ()))]
    picture = draw(snapshot, routes)
    texts = [sorted(cells), problems, events_log, processes, agents, tables]
    shape = hashlib.sha256(msgspec.json.encode([*texts, picture.words])).hexdigest()[:16]
    return Overview(
        cells, shape, state, NUMBERS, problems, processes, agents, tables, events_log, picture
    )


def _numbers(cells: dict[str, str], snapshot: Mapping[str, Any], trend: Trend) -> None:
    history = snapshot.get("history", ())
    rates = [float(point.get("rate") or 0) for point in history]
    behinds = [float(point.get("behind") or 0) for point in history]
    cells["rate"] = charts.rate(float(snapshot.get("rate") or 0))
    cells["behind"] = charts.count(float(snapshot.get("behind") or 0))
    for key in ("errors", "dead_letters"):
        cells[key] = charts.count(float(snapshot.get(key) or 0))
    cells["restarts"] = charts.count(restarts(snapshot))
    lines = {"rate": rates, "behind": behinds}
    lines |= {key: trend.steps(key) for key in ("errors", "dead_letters", "restarts")}
    for number in NUMBERS:
        values = lines[number.key]
        cells[f"line.{number.key}@points"] = charts.spark_line(values)
        cells[f"area.{number.key}@points"] = charts.spark_area(values)
        cells[f"words.{number.key}"] = charts.spark_words(number.label, values)


def _tree(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """Guardian, master, and the master's children, each with the branch before its name."""
    ordered = sorted(rows, key=lambda row: RANKS.get(str(row.get("kind")), 2))
    found: list[tuple[Mapping[str, Any], str]] = []
    has_guardian = any(row.get("kind") == "guardian" for row in rows)
    for at, row in enumerate(ordered):
        rank = RANKS.get(str(row.get("kind")), 2)
        corner = "└" if at == len(ordered) - 1 else "├"
        if rank == 0:
            branch = ""
        elif rank == 1:
            branch = "└" if has_guardian else ""
        else:
            branch = f"\u2003{corner}" if has_guardian else corner
        found.append((row, branch))
    return found


def _process(
    cells: dict[str, str], row: Mapping[str, Any], branch: str, now: float
) -> ProcessRow:
    key = f"p.{row['name']}"
    state = str(row.get("state", "")).lower()
    cells[f"{key}.state"] = state
    cells[f"{key}.state@class"] = f"state {STATES.get(state, 'stopped')}"
    cells[f"{key}.pid"] = str(row.get("pid") or "–")
    since = row.get("since")
    retry_in_s = row.get("retry_in_s")
    if retry_in_s is not None:
        cells[f"{key}.up"] = f"again in {charts.span(float(retry_in_s))}"
    else:
        cells[f"{key}.up"] = charts.span(now - float(since)) if since else "–"
    cpu = row.get("cpu_percent")
    cells[f"{key}.cpu"] = "–" if cpu is None else f"{float(cpu):.0f}\u00a0%"
    rss_bytes = row.get("rss_bytes")
    cells[f"{key}.memory"] = charts.size(float(rss_bytes)) if rss_bytes else "–"
    private_bytes = row.get("private_bytes")
    own = f"{charts.size(float(private_bytes))} of its own" if private_bytes else ""
    cells[f"{key}.memory@title"] = own
    cells[f"{key}.restarts"] = charts.count(float(row.get("restarts") or 0))
    cells[f"{key}.partitions"] = charts.ranges(row.get("partitions") or ()) or "–"
    notes = [str(row["last_exit"])] if row.get("last_exit") else []
    strays = row.get("strays") or ()
    if strays:
        notes.append(f"{len(strays)} processes of its own: {', '.join(map(str, strays))}")
    return ProcessRow(str(row["name"]), branch, key, "; ".join(notes))


def _agent(cells: dict[str, str], row: Mapping[str, Any]) -> Row:
    key = f"a.{row['name']}"
    behind = float(row.get("behind") or 0)
    cells[f"{key}.rate"] = charts.rate(float(row.get("rate") or 0))
    cells[f"{key}.behind"] = charts.count(behind)
    cells[f"{key}.behind@class"] = "number" if behind else "number none"
    cells[f"{key}.events"] = charts.count(float(row.get("events") or 0))
    cells[f"{key}.flow"] = f"{charts.short(float(row.get('rate') or 0))}/s" + (
        f", {charts.short(behind)} behind" if behind else ""
    )
    topics = [str(topic) for topic in row.get("topics", ())]
    return Row(str(row["name"]), str(row["label"]), key, str(row["group"]), topics)


def _table(cells: dict[str, str], row: Mapping[str, Any]) -> Row:
    key = f"t.{row['name']}"
    keys = float(row.get("keys") or 0)
    cells[f"{key}.keys"] = charts.count(keys)
    cells[f"{key}.held"] = f"{charts.short(keys)} keys"
    partitions = [str(row.get("partitions") or 0)]
    help_text = str(row.get("help") or "")
    return Row(
        str(row["name"]), str(row["name"]), key, str(row["group"]), partitions, help_text
    )


def _log_line(event: Mapping[str, Any]) -> LogLine:
    moment = datetime.fromtimestamp(float(event.get("t") or 0)).astimezone()
    return LogLine(
        moment.strftime("%H:%M:%S"),
        moment.isoformat(timespec="seconds"),
        str(event.get("level", "INFO")).lower(),
        str(event.get("text", "")),
    )
