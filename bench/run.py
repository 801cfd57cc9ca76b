"""Runs the benches and prints what they measured: `scripts/bench [--small] [NAME...]`.

`--small` measures less where a bench is long: figures to look at, not to keep.
"""

import importlib
import sys

BENCHES = ("wordcount", "latency", "restart", "memory", "startup", "log", "supervision")
LONG = ("supervision",)


def main(words: list[str]) -> int:
    names = [word for word in words if word != "--small"]
    small = len(names) < len(words)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"Error: there is no bench {unknown[0]!r}\nTry: {' '.join(BENCHES)}")
        return 2
    for name in names or BENCHES:
        options = {"small": True} if small and name in LONG else {}
        for line in importlib.import_module(name).run(**options):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
