"""Agents that take longer than `broker_max_poll_interval`, and processes that stood still."""

import os
import signal
import time

from kafka_clients import unique, write
from kafka_hosts import eventually, hosts

INTERVAL_S = 3.0
STALL_S = 4.5
GONE = "partitions are not this process's any more"

APP = f"""
import asyncio
import ctypes
import time

import streamd

app = streamd.App("ID", broker="BROKER", topic_partitions=1)
words = app.topic("ID-words", value_type=str)
tables = {{}}
held = []


async def hold():
    # Called so, C code keeps the lock that Python's threads run under.
    held or held.append(ctypes.PyDLL(None).usleep({int(STALL_S * 1e6)}))


async def block():
    time.sleep({STALL_S})


async def wait():
    await asyncio.sleep({STALL_S})


async def go_on():
    pass


def agent(name, dawdle):
    table = tables[name] = app.Table(name, default=int)

    @app.agent(words, name=name)
    async def count(stream):
        async for word in stream:
            table[word] += 1
            if word == "slow":
                await dawdle()


for dawdle in (hold, block, wait, go_on):
    agent(dawdle.__name__, dawdle)


@app.page("/counts/")
async def get_counts(web, request):
    return web.json({{
        name: [await table.lookup(word) for word in ("before", "slow", "after")]
        for name, table in tables.items()
    }})
"""


def test_a_slow_agent_keeps_its_place_and_who_stood_still_goes_on_exactly(kafka: str) -> None:
    id = unique("slow")
    source = APP.replace("ID", id).replace("BROKER", f"kafka://{kafka}")
    with hosts(source, 1) as (host,):
        host.environment |= {
            "STREAMD_BROKER_SESSION_TIMEOUT": str(INTERVAL_S),
            "STREAMD_BROKER_MAX_POLL_INTERVAL": str(INTERVAL_S),
            # The harder one: what a member that was replaced commits, the cluster refuses.
            "STREAMD_PROCESSING_GUARANTEE": "exactly_once",
        }
        host.start()
        pid = host.pid("go_on#0")
        os.kill(pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        write(kafka, f"{id}-words", [b'"before"', b'"slow"', b'"after"'])
        eventually(lambda: time.monotonic() - stopped_at > STALL_S)
        os.kill(pid, signal.SIGCONT)
        once = dict.fromkeys(("hold", "block", "wait", "go_on"), [1, 1, 1])
        eventually(lambda: host.get("/counts/") == (200, once))
        eventually(lambda: host.state() == "running")
        assert all(each["restarts"] == 0 for each in host.processes().values())
        lost = {line.split()[3] for line in host.log().splitlines() if GONE in line}
        # Who waits or blocks its loop keeps its place: another thread polls on.
        assert lost <= {"hold#0", "go_on#0"}
