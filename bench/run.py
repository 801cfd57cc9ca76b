"""Runs the benches and prints what they measured: `scripts/bench [OPTION...] [NAME...]`.

`--small` measures less where a bench is long: figures to look at, not to keep. `--by-hand`
measures what streamd is compared with, alone.
"""

import compileall
import importlib
import sys
from pathlib import Path

BENCHES = (
    "wordcount",
    "latency",
    "restart",
    "memory",
    "startup",
    "log",
    "supervision",
    "kafka",
)
PACKAGES = ("streamd", "agentproc", "supervisor", "webgw")
BY_HAND = {"kafka": "kafka_by_hand"}
LONG = ("supervision", "kafka", "kafka_by_hand")


def main(words: list[str]) -> int:
    names = [word for word in words if word not in ("--small", "--by-hand")]
    small = "--small" in words
    modules = BY_HAND if "--by-hand" in words else {name: name for name in BENCHES}
    unknown = [name for name in names if name not in modules]
    if unknown:
        known = f"{' '.join(BENCHES)}, or {' '.join(BY_HAND)} --by-hand"
        print(f"Error: there is no bench {unknown[0]!r}\nTry: {known}")
        return 2
    for package in PACKAGES:
        # As they are installed; a clone may have no bytecode, or that of an older text.
        compileall.compile_dir(Path(__file__).parent.parent / package, quiet=1)
    for name in [modules[name] for name in names or modules]:
        options = {"small": True} if small and name in LONG else {}
        for line in importlib.import_module(name).run(**options):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
