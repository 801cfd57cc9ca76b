"""The snapshot in Prometheus' text format. No I/O."""

from collections.abc import Iterable, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# What librdkafka counts of itself, of all clients of a process.
_CLIENT = {
    "records_read": ("counter", "Kafka records read; a pack is one."),
    "bytes_read": ("counter", "Bytes of them."),
    "records_written": ("counter", "Kafka records written; a pack is one."),
    "bytes_written": ("counter", "Bytes of them."),
    "records_queued": ("gauge", "Kafka records that are not written yet."),
    "requests": ("counter", "Requests to the cluster."),
    "request_errors": ("counter", "Requests and answers that failed."),
    "request_timeouts": ("counter", "Requests that were not answered in time."),
    "disconnects": ("counter", "Connections that ended."),
    "round_trip_ms": ("gauge", "Mean time of a request to the slowest node."),
}

_Sample = tuple[dict[str, str], float]


def render(snapshot: Mapping[str, Any], streams: int) -> bytes:
    """All metrics.

    Args:
        streams: How many pages are open and refresh themselves.
    """
    lines: list[str] = []

    def add(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> None:
        lines.append(f"# HELP streamd_{name} {text}")
        lines.append(f"# TYPE streamd_{name} {kind}")
        lines.extend(f"streamd_{name}{_labels(labels)} {value:g}" if value % 1 else
                     f"streamd_{name}{_labels(labels)} {int(value)}"
                     for labels, value in samples)  # fmt: skip

    def total(name: str, kind: str, key: str, text: str) -> None:
        add(name, kind, text, [({}, float(snapshot.get(key) or 0))])

    def each(
        name: str, kind: str, rows: str, label: Mapping[str, str], key: str, text: str
    ) -> None:
        add(name, kind, text, [
            ({ours: str(row.get(theirs, "")) for ours, theirs in label.items()},
             float(row[key]))
            for row in snapshot.get(rows, ()) if row.get(key) is not None
        ])  # fmt: skip

    info = {key: str(snapshot.get(key, "")) for key in ("name", "app", "version", "broker")}
    add("info", "gauge", "The instance.", [(info, 1)])
    running = snapshot.get("state") == "running"
    add("running", "gauge", "1 when every process runs.", [({}, float(running))])
    total("start_time_seconds", "gauge", "since", "When the instance started.")
    total("events_total", "counter", "events", "Events settled.")
    total("event_rate", "gauge", "rate", "Events settled a second, of late.")
    total("behind_events", "gauge", "behind", "Events not read yet.")
    total("errors_total", "counter", "errors", "Exceptions in agents.")
    total("retries_total", "counter", "retries", "Events tried again.")
    total("dead_letters_total", "counter", "dead_letters", "Events given up.")
    total("checkpoint_milliseconds", "gauge", "checkpoint_ms", "Mean time of a checkpoint.")
    total("wal_bytes", "gauge", "wal_bytes", "Size of the log's write-ahead file.")
    agent = {"agent": "name", "group": "group"}
    each("agent_events_total", "counter", "agents", agent, "events", "Events settled.")
    each("agent_event_rate", "gauge", "agents", agent, "rate", "Events settled a second.")
    each("agent_behind_events", "gauge", "agents", agent, "behind", "Events not read yet.")
    partition = {name: name for name in ("group", "agent", "topic", "partition")}
    each(
        "lag_records", "gauge", "lag", partition, "behind",
        "Records on Kafka that an agent has not read; one may hold many events.",
    )  # fmt: skip
    table = {"table": "name", "group": "group"}
    each("table_keys", "gauge", "tables", table, "keys", "Keys held.")
    copy = {name: name for name in ("group", "table", "partition", "process")}
    each(
        "standby_behind_records", "gauge", "standby", copy, "behind",
        "Records of a table's changelog that are not in the copy of another host's partition.",
    )  # fmt: skip
    process = {"process": "name", "group": "group"}
    each("process_cpu_percent", "gauge", "processes", process, "cpu_percent", "CPU used.")
    each("process_resident_bytes", "gauge", "processes", process, "rss_bytes", "Memory held.")
    each(
        "process_private_bytes", "gauge", "processes", process, "private_bytes",
        "Memory that no other process shares.",
    )  # fmt: skip
    each("process_restarts_total", "counter", "processes", process, "restarts", "Restarts.")
    each(
        "process_checkpoints_total", "counter", "processes", process, "checkpoints",
        "Checkpoints since the process started.",
    )  # fmt: skip
    for key, (kind, text) in _CLIENT.items():
        name = f"kafka_client_{key}" + ("_total" if kind == "counter" else "")
        add(name, kind, text, [
            ({"process": row["name"], "group": row.get("group") or ""},
             float(row["client"][key]))
            for row in snapshot.get("processes", ())
            if key in row.get("client", ())
        ])  # fmt: skip
    add("process_up", "gauge", "1 when the process runs.", [
        ({"process": row["name"], "group": row.get("group") or ""},
         float(str(row.get("state", "")).upper() == "RUNNING"))
        for row in snapshot.get("processes", ())
    ])  # fmt: skip
    add("open_pages", "gauge", "Pages that refresh themselves.", [({}, float(streams))])
    return "\n".join(lines).encode() + b"\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
