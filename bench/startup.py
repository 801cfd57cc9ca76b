"""How long the commands take that people type."""

import time
from collections.abc import Iterator

from instance import instance
from probe import ECHO

ROUNDS = 9


def run() -> Iterator[str]:
    """Lines of the report."""
    yield f"commands, median of {ROUNDS}"
    with instance("bench", ECHO) as bench:
        began_at = time.monotonic()
        bench.command("start")
        took_s = [time.monotonic() - began_at]
        yield f"  streamd start, until ready   {took_s[0] * 1000:6.0f} ms, once"
        for words in (["--help"], ["status"], ["ps"]):
            took_s = []
            for _ in range(ROUNDS):
                began_at = time.monotonic()
                bench.command(*words)
                took_s.append(time.monotonic() - began_at)
            yield f"  streamd {words[0]:20} {sorted(took_s)[ROUNDS // 2] * 1000:6.0f} ms"
        began_at = time.monotonic()
        bench.command("stop")
        took_s = [time.monotonic() - began_at]
        yield f"  streamd stop                 {took_s[0] * 1000:6.0f} ms, once"
