"""Dead letters: what is kept of an event that was given up.

Its key, value and headers as they came, and in further headers why it was given up and where
it came from. Where that is more than the topic takes, it is shortened: a letter that cannot be
written would take its process down, again and again.
"""

import time
from typing import TYPE_CHECKING

from streamd.agentproc.broker import TP, Headers, Output

if TYPE_CHECKING:
    from streamd.agentproc.runs import Run
    from streamd.agentproc.trials import Trial

SHORT_BYTES = 1000  # of the key, and of the reason and the error, where all is too much


def dead_letter(
    run: "Run", index: int, agent: str, trial: "Trial", topic: str, most_bytes: int
) -> Output:
    """The record that tells of an event that was given up.

    Args:
        most_bytes: Of key, value and headers. Above it the value is cut to its first bytes, the
            key to 1000, and the event's own headers are left out; `streamd-cut` then says how
            many bytes key and value had.
    """
    key, value = run.raw_keys[index], run.raw_values[index]
    why: Headers = [
        ("streamd-reason", (trial.refused or "").encode()),
        ("streamd-error", trial.error.encode()),
        ("streamd-agent", agent.encode()),
        ("streamd-topic", run.tp.topic.encode()),
        ("streamd-partition", str(run.tp.partition).encode()),
        ("streamd-offset", str(run.positions[index]).encode()),
        ("streamd-tries", str(trial.tries).encode()),
    ]
    headers = [*why, *(run.headers[index] if run.headers is not None else [])]
    if _size_bytes(key, value, headers) > most_bytes:
        sizes = f"key {len(key or b'')}, value {len(value or b'')}"
        headers = [
            *((name, text[:SHORT_BYTES]) for name, text in why),
            ("streamd-cut", sizes.encode()),
        ]
        key = None if key is None else key[:SHORT_BYTES]
        room = max(0, most_bytes - _size_bytes(key, None, headers))
        value = None if value is None else value[:room]
    return Output(TP(topic, 0), [key], [value], [time.time()], [headers])


def _size_bytes(key: bytes | None, value: bytes | None, headers: Headers) -> int:
    carried = len(key or b"") + len(value or b"")
    return carried + sum(len(name) + len(text) for name, text in headers)
