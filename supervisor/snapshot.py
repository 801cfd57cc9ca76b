"""The state of an instance as data: what `status`, the stats page and `/stats/` show.

`docs/internals.md` has the layout; fields are only added.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from streamd.supervisor import scaling
from streamd.supervisor.changes import Changes
from streamd.supervisor.child import Child
from streamd.supervisor.figures import Figures
from streamd.supervisor.fleet import Fleet
from streamd.supervisor.logs import Logs
from streamd.supervisor.registry import Registry
from streamd.supervisor.states import State
from streamd.supervisor.strays import is_from
from streamd.wire import Hello

SCHEMA = "streamd.status/1"
HISTORY_S = 120
RATE_S = 5
SHOWN_EVENTS = 50


class Snapshots:
    """Builds the snapshot; keeps what a single look cannot tell: rates and the last minutes."""

    def __init__(
        self,
        fixed: dict[str, Any],
        fleet: Fleet,
        registry: Registry,
        changes: Changes,
        logs: Logs,
    ) -> None:
        """
        Args:
            fixed: The fields that do not change while the master lives.
        """
        self._fixed = fixed
        self._fleet = fleet
        self._registry = registry
        self._changes = changes
        self._logs = logs
        self._history: deque[dict[str, float]] = deque(maxlen=HISTORY_S)
        self._totals: deque[tuple[float, dict[str, int]]] = deque(maxlen=RATE_S + 1)
        self._figures = Figures()
        # The app, and how many processes each of its groups can have.
        self._most: tuple[Hello | None, dict[str, int]] = (None, {})

    def tick(self, now: float) -> None:
        """Note the counters; to be called once a second."""
        events = self._events()
        self._totals.append((now, events))
        self._history.append(
            {
                "t": time.time(),
                "behind": sum(self._behind().values()),
                "rate": round(sum(self._rates().values()), 1),
            }
        )

    def build(self, phase: str, *, fresh: bool = True) -> dict[str, Any]:
        """The snapshot of this moment.

        Args:
            phase: "starting", "running" or "stopping".
            fresh: Read the figures of all processes anew; else of some of them, by turns.
        """
        fleet = self._fleet
        processes = self.processes(fresh=fresh)
        problems = [*_problems(fleet.children.values()), *_waits(fleet.children.values())]
        if self._logs.problem is not None:
            problems.append(
                {
                    "process": "master",
                    "code": "log",
                    "text": self._logs.problem,
                    "remedy": "make room, or see who may write there; streamd logs has all",
                }
            )
        events, behind = self._events(), self._behind()
        state = "degraded" if phase == "running" and problems else phase
        if phase == "running" and self._changes.is_reloading:
            state = "reloading"
        stats = [child.run.stats for child in fleet.agents if child.run and child.run.stats]
        counted = {
            name: [getattr(each, name) for each in stats]
            + [getattr(child.totals, name) for child in fleet.agents]
            for name in ("errors", "retries", "dead_letters")
        }
        checkpoints = [each.checkpoint_ms for each in stats if each.checkpoints]
        return {
            "schema": SCHEMA,
            **self._fixed,
            "state": state,
            "sentence": self.sentence(phase),
            "problems": problems,
            "rate": round(sum(self._rates().values()), 1),
            "behind": sum(behind.values()),
            "events": sum(events.values()),
            **{name: sum(counted[name]) for name in counted},
            "checkpoint_ms": round(sum(checkpoints) / len(checkpoints), 2)
            if checkpoints
            else 0.0,
            "wal_bytes": self._wal_bytes(),
            "processes": processes,
            "groups": self._groups(),
            "agents": self._agents(events, behind),
            "tables": self._tables(),
            "standby": self._standby(),
            "lag": self._lag(),
            "history": list(self._history),
            "events_log": self._registry.events[-SHOWN_EVENTS:],
        }

    def sentence(self, phase: str) -> str:
        """How the instance is, in a sentence."""
        children = list(self._fleet.children.values())
        if phase == "stopping":
            left = [child.name for child in children if child.state.has_process]
            return f"Stopping; {', '.join(left) or 'nothing'} still to end."
        down = [child for child in children if child.state is not State.RUNNING]
        behind = sum(self._behind().values())
        if phase == "starting":
            names = ", ".join(child.name for child in down) or "nothing"
            why = "".join(f"; it {wait['text']}" for wait in _waits(down))
            return f"Starting; waiting for {names}{why}."
        if change := self._changes.sentence:
            return change
        if down:
            words = ", ".join(f"{child.name} is {child.state.value}" for child in down)
            return f"{len(children) - len(down)} of {len(children)} processes run; {words}."
        if waits := [f"{wait['process']}: {wait['text']}" for wait in _waits(children)]:
            return f"{'; '.join(waits)}."
        return f"All {len(children)} processes run; {behind} events behind."

    def processes(self, *, fresh: bool = True) -> list[dict[str, Any]]:
        """Every process of the tree, as `ps` shows it."""
        strays = list(self._fleet.reaper.strays.values())
        pids = [child.run.pid for child in self._fleet.children.values() if child.run]
        figures = self._figures.look([os.getppid(), os.getpid(), *pids], fresh=fresh)
        partitions = self._fleet.owners.by_process()
        rows = []
        for name, pid in (("guardian", os.getppid()), ("master", os.getpid())):
            rows.append(
                {
                    **self._row(name, name, "", "RUNNING", self._fixed["since"]),
                    **figures[pid],
                }
            )
        known: set[int] = set()
        for child in self._fleet.children.values():
            row = self._row(child.name, child.kind, child.group, child.state.value, child.since)
            row["restarts"] = child.restarts
            if self._changes.is_reloading and child.kind == "agent":
                row["code"] = "old" if child.code is None else "new"
            row["hangs"] = child.hangs
            row["recycles"] = child.recycles
            row["partitions"] = partitions.get(child.name, [])
            row["last_exit"] = child.last_exit
            if child.retry_at is not None:
                row["retry_in_s"] = round(max(0.0, child.retry_at - time.monotonic()), 1)
            if (run := child.run) is not None:
                row.update(figures[run.pid])
                row["strays"] = [
                    stray.pid for stray in strays if is_from(stray, child.name, run)
                ]
                known.update(row["strays"])
                row["busy_with"] = run.stats.busy_with if run.stats else []
                row["draining"] = run.draining
                row["waits_for"] = run.stats.waits_for if run.stats else ""
                if run.stats is not None:
                    row["checkpoints"] = run.stats.checkpoints
                    row["client"] = run.stats.client
            rows.append(row)
        # Whose process is gone, or who left its session, is shown with the master.
        rows[1]["strays"] = [stray.pid for stray in strays if stray.pid not in known]
        return rows

    def _row(
        self, name: str, kind: str, group: str, state: str, since: float
    ) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "group": group,
            "pid": None,
            "state": state,
            "since": since,
            "cpu_percent": 0.0,
            "rss_bytes": 0,
            "private_bytes": 0,
            "restarts": 0,
            "partitions": [],
            "last_exit": None,
            "retry_in_s": None,
            "strays": [],
        }

    def _events(self) -> dict[str, int]:
        """Events settled, by agent, since the master started."""
        events: dict[str, int] = {}
        for child in self._fleet.agents:
            running = child.run.stats.events if child.run and child.run.stats else {}
            for counts in (child.totals.events, running):
                for agent, count in counts.items():
                    events[agent] = events.get(agent, 0) + count
        return events

    def _behind(self) -> dict[str, int]:
        """Events behind, by agent."""
        behind: dict[str, int] = {}
        for child in self._fleet.agents:
            if child.run and child.run.stats:
                for agent, count in child.run.stats.lag.items():
                    behind[agent] = behind.get(agent, 0) + count
        return behind

    def _rates(self) -> dict[str, float]:
        """Events a second, by agent, over the last seconds."""
        if len(self._totals) < 2:
            return {}
        (first_at, first), (last_at, last) = self._totals[0], self._totals[-1]
        span_s = max(0.001, last_at - first_at)
        return {
            agent: max(0.0, (count - first.get(agent, 0)) / span_s)
            for agent, count in last.items()
        }

    def _agents(self, events: dict[str, int], behind: dict[str, int]) -> list[dict[str, Any]]:
        rates = self._rates()
        hello = self._fleet.hello
        return [
            {
                "name": agent.name,
                "label": agent.label,
                "group": group.name,
                "topics": agent.topics,
                "sends": agent.sends,
                "rate": round(rates.get(agent.name, 0.0), 1),
                "events": events.get(agent.name, 0),
                "behind": behind.get(agent.name, 0),
                "concurrency": agent.concurrency,
            }
            for group in (hello.groups if hello else ())
            for agent in group.agents
        ]

    def group_figures(self) -> dict[str, tuple[int, float]]:
        """Events behind and events a second, by group."""
        behind, rates, hello = self._behind(), self._rates(), self._fleet.hello
        return {
            group.name: (
                sum(behind.get(agent.name, 0) for agent in group.agents),
                sum(rates.get(agent.name, 0.0) for agent in group.agents),
            )
            for group in (hello.groups if hello else ())
        }

    def _groups(self) -> list[dict[str, Any]]:
        hello, autos = self._fleet.hello, self._changes.auto_groups()
        if hello is not None and self._most[0] is not hello:
            most = {
                group.name: scaling.most_processes(hello, group.name) for group in hello.groups
            }
            self._most = hello, most
        sizes = Counter(child.group for child in self._fleet.agents)
        return [
            {
                "name": group.name,
                "processes": sizes[group.name],
                "most": self._most[1][group.name],
                "auto": group.name in autos,
                "why": group.why,
            }
            for group in (hello.groups if hello else ())
            if hello is not None
        ]

    def _wal_bytes(self) -> int:
        log = self._fleet.children.get("log")
        state = log.run.log_state if log is not None and log.run is not None else None
        return state.wal_bytes if state is not None else 0

    def _lag(self) -> list[dict[str, Any]]:
        """How far each agent is in each partition; [] where the log does not say."""
        log, hello = self._fleet.children.get("log"), self._fleet.hello
        if log is None or log.run is None or log.run.lags is None or hello is None:
            return []
        groups = {agent.name: group.name for group in hello.groups for agent in group.agents}
        return [
            {
                "group": groups.get(row.agent, ""),
                "agent": row.agent,
                "topic": row.topic,
                "partition": row.partition,
                "position": row.position,
                "end": row.end,
                "behind": row.behind,
            }
            for row in log.run.lags.rows
        ]

    def _tables(self) -> list[dict[str, Any]]:
        hello = self._fleet.hello
        keys: dict[str, int] = {}
        for child in self._fleet.agents:
            if child.run and child.run.stats:
                for table, count in child.run.stats.tables.items():
                    keys[table] = keys.get(table, 0) + count
        return [
            {
                "name": table.name,
                "group": table.group,
                "keys": keys.get(table.name, 0),
                "partitions": table.partitions,
                "help": table.help,
            }
            for table in (hello.tables if hello else ())
        ]

    def _standby(self) -> list[dict[str, Any]]:
        """The partitions of tables that processes here follow, and another host has."""
        return [
            {
                "table": row.table,
                "group": child.group,
                "partition": row.partition,
                "process": child.name,
                "behind": row.behind,
            }
            for child in self._fleet.agents
            if child.run and child.run.stats
            for row in child.run.stats.standby
        ]


def _waits(children: Iterable[Child]) -> Iterable[dict[str, Any]]:
    """What processes wait for that is not theirs to mend, each thing once."""
    waiting: dict[str, list[str]] = {}
    for child in children:
        if child.run is not None and child.run.stats and child.run.stats.waits_for:
            waiting.setdefault(child.run.stats.waits_for, []).append(child.name)
    for text, names in waiting.items():
        yield {
            "process": ", ".join(names[:3])
            + (f" and {len(names) - 3} more" * (len(names) > 3)),
            "code": "waits",
            "text": text,
            "remedy": "",
        }


def _problems(children: Iterable[Child]) -> Iterable[dict[str, Any]]:
    for child in children:
        failing = child.failing
        why = failing.message if failing else child.last_exit
        if child.state is State.FATAL:
            yield {
                "process": child.name,
                "code": "fatal",
                "text": f"FATAL, {child.given_up_for}: {why}",
                "remedy": (failing and failing.remedy) or f"streamd restart {child.name}",
                "lines": child.last_lines,
            }
        elif child.run is not None and child.run.held_in:
            yield {
                "process": child.name,
                "code": "unkillable",
                "text": f"{child} was killed and has not ended ({child.run.held_in})",
                "remedy": "mend what the kernel waits for: a disk, a network file system",
            }
        elif child.state is State.BACKOFF:
            yield {
                "process": child.name,
                "code": "backoff",
                "text": f"BACKOFF: {why}",
                "remedy": (failing and failing.remedy) or f"streamd logs {child.name}",
            }
