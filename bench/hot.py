"""Writes down which functions an agent process runs: `scripts/hot`.

The processes of a small app note every function that is called in them, from their fork on.
What they ran is written to `agentproc/hot.txt`; `streamd.agentproc.sharing` says what for.
"""

import time
from pathlib import Path

from instance import instance

HOT = Path(__file__).parent.parent / "agentproc" / "hot.txt"
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


def note(frame, event, argument):
    if event == "call":
        name = frame.f_globals.get("__name__")
        called[f"{name}:{frame.f_code.co_qualname}"] = name


def begin():
    sys.setprofile(note)
    threading.setprofile(note)


os.register_at_fork(after_in_child=begin)


def write():
    hot = [function for function, module in list(called.items()) if module != __name__]
    with open(f"hot-{os.getpid()}", "w") as file:
        file.write("".join(f"{function}\\n" for function in hot))


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
        found = {
            line
            for path in bench.folder.glob("hot-*")
            for line in path.read_text().splitlines()
        }
    HOT.write_text("".join(f"{line}\n" for line in sorted(found)))
    print(f"{len(found)} functions: {HOT.relative_to(HOT.parent.parent)}")


if __name__ == "__main__":
    main()
