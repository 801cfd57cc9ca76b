"""Writes down which functions an agent process runs, and the names in them: `scripts/hot`.

The processes of a small app note every function that is called in them, from their fork on.
What they ran is written to `agentproc/hot.txt`, the names of attributes, globals, keywords and
modules in it to `agentproc/names.txt`. What for, `streamd.agentproc.sharing` and
`streamd.agentproc.start` say.
"""

import time
from pathlib import Path

from instance import instance

ROOT = Path(__file__).parent.parent
HOT = ROOT / "agentproc" / "hot.txt"
NAMES = ROOT / "agentproc" / "names.txt"
EVENTS = 300
REPORTS_S = 3.0
APP = """
import os
import sys
import threading

import streamd

app = streamd.App("bench")
words = app.topic("words", key_type=str, value_type=str)
counts = app.Table("counts", default=int)
called = {}
names = set()


def note(frame, event, argument):
    if event == "call":
        name = frame.f_globals.get("__name__")
        called[f"{name}:{frame.f_code.co_qualname}"] = name
        names.update(frame.f_code.co_names)
        names.update(identifiers(frame.f_code.co_consts))
        names.update((str(name), frame.f_code.co_name))


def identifiers(constants):
    for constant in constants:
        if isinstance(constant, tuple):
            yield from identifiers(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def begin():
    sys.setprofile(note)
    threading.setprofile(note)


os.register_at_fork(after_in_child=begin)


def write():
    hot = [function for function, module in list(called.items()) if module != __name__]
    with open(f"hot-{os.getpid()}", "w") as file:
        file.write("".join(f"{function}\\n" for function in hot))
    with open(f"names-{os.getpid()}", "w") as file:
        file.write("".join(f"{name}\\n" for name in list(names)))


@app.agent(words)
async def count(stream):
    async for word in stream:
        counts[word] += 1


@app.agent(value_type=int)
async def number(stream):
    async for value in stream:
        if value < 0:
            write()
        else:
            await words.send(key=str(value & 7), value=str(value & 7))


@app.task
async def feed():
    for event in range(%d):
        await number.cast(event)


@app.timer(1.0)
async def tick():
    counts["1"]
    write()


@app.command()
async def done(self):
    await number.send(value=-1)
"""


def main() -> None:
    with instance("bench", APP % EVENTS) as bench:
        bench.command("start")
        bench.wait("all events", lambda status: status["events"] >= 2 * EVENTS, 60)
        time.sleep(REPORTS_S)
        bench.command("done")
        bench.wait("the last event", lambda status: status["events"] > 2 * EVENTS, 60)
        time.sleep(REPORTS_S)
        for kind, kept in (("hot", HOT), ("names", NAMES)):
            lines = {
                line
                for path in bench.folder.glob(f"{kind}-*")
                for line in path.read_text().split()
            }
            kept.write_text("".join(f"{line}\n" for line in sorted(lines)))
            print(f"{len(lines)} lines in {kept.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
