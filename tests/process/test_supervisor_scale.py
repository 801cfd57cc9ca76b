"""The number of processes of a group is changed while it works."""

import asyncio
import os
import re
import signal

import psutil
import pytest
from supervisor_load import COUNT, Feed, counted, pids, wait_counted
from supervisor_tree import Tree, eventually, tree_of
from test_supervisor_reload import streamd

from streamd.errors import StreamdError
from streamd.link import connect
from streamd.wire import Append, OutRecord

ONE = COUNT.replace("processes=3", "processes=1")
WIDE = ONE.replace("partitions=4", "partitions=20")

SLOW = """
import asyncio
import streamd
app = streamd.App("proj")
jobs = app.topic("jobs", value_type=int, partitions=4)

@app.agent(jobs, processes="auto")
async def work(stream):
    async for job in stream:
        await asyncio.sleep(0.01)
"""


def scale(house: Tree, group: str, processes: int | str) -> list[str]:
    """Scale, and see what the answer says."""
    *lines, last = house.ask_all("scale", group=group, processes=processes)
    if isinstance(processes, int):
        assert last == {"group": group, "processes": processes}
    return [line["doing"] for line in lines]


def sizes(house: Tree) -> dict[str, int]:
    """How many processes each group has."""
    return {group["name"]: group["processes"] for group in house.ask("status")["groups"]}


def slots(house: Tree) -> dict[str, list[int]]:
    """The partitions of each process of the group `count`."""
    rows = house.ask("ps")
    return {row["name"]: row["partitions"] for row in rows if row["group"] == "count"}


def test_up_and_down_under_load_loses_nothing_and_leaves_nothing() -> None:
    scale_up_and_down(3)


def scale_up_and_down(times: int) -> None:
    """Scale a group from 1 to 20 and back so often while it works."""
    with tree_of(WIDE) as house:
        master = house.run().pid("master")

        with Feed(house) as feed:
            for _ in range(times):
                eventually(lambda: feed.sent.total() > 100, 20)
                scale(house, "count", 20)
                assert len(slots(house)) == 20
                scale(house, "count", 1)
            scale(house, "split", 3)
            eventually(lambda: feed.sent.total() > 2000, 20)

        wait_counted(house, feed.sent)
        assert sizes(house) == {"split": 3, "count": 1, "app": 1}
        assert slots(house) == {"count#0": list(range(20))}
        assert sorted(path.name for path in house.folder.path.glob("count#*")) == [
            "count#0.sock",
            "count#0.sock.r",
        ]
        descendants = psutil.Process(master).children(recursive=True)
        assert not [each for each in descendants if each.status() == psutil.STATUS_ZOMBIE]
        assert len([each for each in pids(house) if each.startswith("count")]) == 1
        # What processes that are no more have counted is not forgotten.
        eventually(lambda: house.ask("status")["agents"][1]["events"] == feed.sent.total())


READER = """
@app.agent(lines, on_error="stop", group="read")
async def read(stream):
    async for line in stream:
        for word in line.split():
            WAY
"""


@pytest.mark.parametrize("way", ["counts.get(word)", "await counts.lookup(word)"])
def test_who_reads_the_table_of_a_group_that_is_scaled_notices_nothing(way: str) -> None:
    with tree_of(ONE + READER.replace("WAY", way)) as house:
        house.run()

        with Feed(house, pause_s=0.05) as feed:
            eventually(lambda: feed.sent.total() > 100, 20)
            for processes in (4, 2, 3, 1):
                sent = feed.sent.total()
                scale(house, "count", processes)
                eventually(lambda sent=sent: feed.sent.total() > sent + 80, 20)  # type: ignore[misc]

        wait_counted(house, feed.sent)
        status = house.ask("status")
        assert status["errors"] == 0, house.log
        assert "FATAL" not in house.log and house.process("read#0")["restarts"] == 0


def test_partitions_are_shared_out_anew() -> None:
    with tree_of(ONE) as house:
        house.run()

        told = scale(house, "count", 3)

        assert told == [
            "count is drained: its partitions are shared out anew",
            "count has 3 processes, had 1",
        ]
        assert slots(house) == {"count#0": [0, 3], "count#1": [1], "count#2": [2]}
        assert scale(house, "count", 3) == ["count has 3 processes already"]
        assert "count has 3 processes, had 1" in str(house.ask("events"))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"group": "count", "processes": 5}, "its topics have 4 partitions"),
        ({"group": "count", "processes": 0}, "1 process or more, not 0"),
        ({"group": "app", "processes": 2}, "run in one process"),
        ({"group": "nobody", "processes": 2}, "there is no group 'nobody'"),
        ({"group": "count", "processes": "many"}, "a number or 'auto'"),
        ({"group": "count", "processes": True}, "a number or 'auto'"),
        ({}, "scale takes a group"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    one_house: Tree, args: dict[str, object], text: str
) -> None:
    before = pids(one_house)

    with pytest.raises(StreamdError, match=re.escape(text)) as refused:
        one_house.ask_all("scale", **args)

    assert refused.value.exit_code == 2
    assert pids(one_house) == before


@pytest.fixture(scope="module")
def one_house():  # type: ignore[no-untyped-def]
    """An instance that no test changes."""
    with tree_of(ONE) as house:
        yield house.run()


def test_a_size_outlives_deaths_and_reloads_but_not_the_instance() -> None:
    with tree_of(ONE) as house:
        house.run()
        scale(house, "count", 2)

        for name in ("count#1", "zygote"):
            os.kill(house.pid(name), signal.SIGKILL)
        eventually(lambda: house.process("count#1")["restarts"] == 1)
        eventually(lambda: house.process("zygote")["restarts"] == 1)
        eventually(lambda: house.ask("status")["sentence"].startswith("All 6"))
        assert house.ask_all("reload")[-1] == {"reloaded": "4 processes run the new code"}
        assert slots(house) == {"count#0": [0, 2], "count#1": [1, 3]}

        house.signal(signal.SIGTERM)
        assert house.wait_exit() == 0
        assert sizes(house.run())["count"] == 1


def test_ttin_and_ttou_change_the_group_that_needs_it() -> None:
    with tree_of(ONE) as house:
        house.run()

        # Nobody is behind: the smallest grows, one after the other.
        house.signal(signal.SIGTTIN)
        eventually(lambda: sizes(house) == {"split": 2, "count": 1, "app": 1})
        house.signal(signal.SIGTTIN)
        eventually(lambda: sizes(house) == {"split": 2, "count": 2, "app": 1})
        scale(house, "count", 4)
        house.signal(signal.SIGTTOU)

        eventually(lambda: sizes(house)["count"] == 3)
        eventually(lambda: "TTOU: scaling count to 3" in house.log)


def test_changes_that_meet_wait_for_each_other_and_say_so() -> None:
    slow = ONE + "\nimport time; time.sleep(0.3)\n"
    with tree_of(slow) as house:
        house.run()

        async def meet() -> tuple[list[object], list[object], list[object]]:
            def later(verb: str, **args: object) -> "asyncio.Future[list[object]]":
                return asyncio.ensure_future(asyncio.to_thread(house.ask_all, verb, **args))

            reload = later("reload")
            await asyncio.to_thread(
                eventually, lambda: house.ask("status")["state"] == "reloading"
            )
            scaled = later("scale", group="count", processes=2)
            await asyncio.to_thread(eventually, lambda: "waits until" in house.log)
            restarted = later("restart", names=["split"])
            return await reload, await scaled, await restarted

        reloaded, scaled, restarted = asyncio.run(meet())

        assert reloaded[-1] == {"reloaded": "3 processes run the new code"}
        assert scaled[0] == {"doing": "waits until this is done: reloading"}
        assert scaled[-1] == {"group": "count", "processes": 2}
        assert restarted[0] == {"doing": "waits until this is done: scaling count to 2"}
        assert restarted[-1] == ["split#0"]
        assert house.ask("status")["sentence"].startswith("All 6 processes run")


def test_a_group_that_follows_its_lag_grows_when_it_is_behind() -> None:
    with tree_of(SLOW) as house:
        house.run()
        assert house.ask("status")["groups"][0]["auto"] is True

        asyncio.run(feed_jobs(house, 4000))

        eventually(lambda: sizes(house)["work"] == 2, 15)
        eventually(lambda: "work follows its lag: 1 -> 2 processes" in str(house.ask("events")))
        scale(house, "work", 1)
        assert house.ask("status")["groups"][0]["auto"] is False
        assert scale(house, "work", "auto") == ["work follows how far it is behind"]
        assert house.ask("status")["groups"][0]["auto"] is True


async def feed_jobs(house: Tree, jobs: int) -> None:
    """Append jobs."""
    link = await connect(house.folder.log_path, "log")
    await link.request(Append([OutRecord("jobs", None, b"1") for _ in range(jobs)]), 10.0)
    link.close()


def test_the_command_scales_several_groups_and_says_so() -> None:
    with tree_of(ONE) as house:
        house.run()

        done = streamd(house, "scale", "count=4", "split=2")

        assert done.returncode == 0, done.stderr
        assert done.stdout == "count has 4 processes.\nsplit has 2 processes.\n"
        assert sizes(house) == {"split": 2, "count": 4, "app": 1}
        done = streamd(house, "scale", "count=9")
        assert done.returncode == 2
        assert (
            "Error: count cannot have 9 processes: its topics have 4 partitions" in done.stderr
        )
        assert counted(house).total() == 0
