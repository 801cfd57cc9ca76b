"""Runs the benches and prints what they measured: `scripts/bench [NAME...]`."""

import importlib
import sys

BENCHES = ("wordcount", "latency", "restart", "memory", "startup", "log")


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"Error: there is no bench {unknown[0]!r}\nTry: {' '.join(BENCHES)}")
        return 2
    for name in names or BENCHES:
        for line in importlib.import_module(name).run():
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
