"""What is kept of an event that was given up, also where it is more than may be kept."""

from streamd import App
from streamd.agentproc.broker import TP, Batch, Headers
from streamd.agentproc.letters import dead_letter
from streamd.agentproc.runs import Run
from streamd.agentproc.trials import Trial


def letter_of(
    key: bytes | None, value: bytes | None, headers: Headers, most_bytes: int
) -> tuple[bytes | None, bytes | None, dict[str, bytes]]:
    batch = Batch(TP("t", 3), [7], [key], [value], [1.0], [headers], 8)
    run = Run(batch, App("proj").topic("t"), [None], None, 0)
    trial = Trial(refused="3 tries failed", error="E" * 5000, tries=3)
    letter = dead_letter(run, 0, "a", trial, "letters", most_bytes)
    assert letter.tp == TP("letters", 0) and letter.headers is not None
    return letter.keys[0], letter.values[0], dict(letter.headers[0])


def test_an_event_is_kept_as_it_came_where_there_is_room() -> None:
    key, value, headers = letter_of(b"k", b"v" * 2000, [("h", b"1")], 10_000)

    assert (key, value, headers["h"]) == (b"k", b"v" * 2000, b"1")
    assert headers["streamd-topic"] == b"t" and headers["streamd-partition"] == b"3"
    assert headers["streamd-error"] == b"E" * 5000
    assert "streamd-cut" not in headers


def test_one_that_is_too_large_is_cut_to_what_the_topic_takes() -> None:
    key, value, headers = letter_of(b"k" * 3000, b"v" * 20_000, [("h", b"1" * 9000)], 10_000)

    assert key == b"k" * 1000 and value is not None
    assert value == b"v" * len(value)
    carried = len(key) + len(value) + sum(len(n) + len(v) for n, v in headers.items())
    assert carried == 10_000
    assert headers["streamd-cut"] == b"key 3000, value 20000"
    assert headers["streamd-reason"] == b"3 tries failed" and headers["streamd-offset"] == b"7"
    assert "h" not in headers


def test_what_has_no_key_and_no_value_is_cut_too() -> None:
    key, value, headers = letter_of(None, None, [("h", b"1" * 9000)], 5000)

    assert key is value is None
    assert headers["streamd-cut"] == b"key 0, value 0"
