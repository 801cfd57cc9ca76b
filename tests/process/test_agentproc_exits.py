"""`sys.exit` in the user's code ends the process with its code, and keeps what is settled."""

import pytest
from supervisor_tree import eventually, tree_of

AGENT = """
import sys
import streamd
app = streamd.App("proj", retry_backoff="0.05s")
words = app.topic("words", value_type=str)
seen = app.Table("seen", default=int)

@app.agent(words, restart="RESTART")
async def count(stream):
    async for word in stream:
        seen[word] += 1
        if word == "bye":
            sys.exit(CODE)

@app.task
async def feed():
    for word in ("one", "bye"):
        await (await words.send(value=word, key="same"))
"""

TASK = """
import asyncio, sys
import streamd
app = streamd.App("proj")
words = app.topic("words", value_type=str)

@app.agent(words)
async def show(stream):
    async for word in stream:
        print("got", word)

@app.agent(restart="transient", group="batch")
async def unused(stream):
    async for _ in stream:
        print("never")

done = app.Table("done", default=int)

@app.agent(group="batch")
async def writer(stream):
    async for _ in stream:
        done["x"] += 1

@app.task
async def batch():
    done["runs"] += 1
    await words.send(value="the last word")
    HOW
"""


def state_of(house, name: str) -> str:  # type: ignore[no-untyped-def]
    return str(house.process(name)["state"])


def test_an_agent_that_calls_sys_exit_0_is_done_where_it_is_transient() -> None:
    source = AGENT.replace("RESTART", "transient").replace("CODE", "0")
    with tree_of(source) as house:
        house.run()

        eventually(lambda: state_of(house, "count#0") == "STOPPED", 15)

        assert house.process("count#0")["last_exit"].startswith("exited with 0")
        assert "agent proj.count ended its process with exit code 0" in house.log
        assert "Traceback" not in house.log


def test_an_agent_that_calls_sys_exit_again_and_again_is_a_crash_of_that_code() -> None:
    source = AGENT.replace("RESTART", "permanent").replace("CODE", "5")
    with tree_of(source) as house:
        house.run()

        eventually(lambda: "took its process down 3 times" in house.log, 20)

        assert house.process("count#0")["last_exit"] == "exited with 5"


@pytest.mark.parametrize(
    "how", ["sys.exit()", "asyncio.create_task(leave()); await asyncio.sleep(60)"]
)
def test_a_task_that_calls_sys_exit_is_done_where_it_is_transient(how: str) -> None:
    source = TASK.replace("HOW", how) + "\nasync def leave():\n    sys.exit(0)\n"
    with tree_of(source) as house:
        house.run()

        eventually(lambda: state_of(house, "batch#0") == "STOPPED", 15)

        assert house.process("batch#0")["last_exit"].startswith("exited with 0")
        if how == "sys.exit()":
            # What it did before is kept.
            eventually(lambda: "got the last word" in house.log, 10)
