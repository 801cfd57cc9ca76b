"""A hundred processes and more: all replaced soon, and still told of soon."""

import os
import signal
import time

from supervisor_tree import Tree, allowed_s, eventually, many, tree_of

from streamd.supervisor import tree


def agents(house: Tree) -> dict[str, int]:
    """The pid of each agent process that runs."""
    rows = house.ask("status")["processes"]
    return {
        row["name"]: row["pid"]
        for row in rows
        if row["kind"] == "agent" and row["state"] == "RUNNING"
    }


def test_a_hundred_that_are_killed_at_once_are_all_replaced_soon_and_each_once() -> None:
    with tree_of(many(100)) as house:
        before = agents(house.run())
        assert len(before) == 101
        began = time.monotonic()

        for pid in before.values():
            os.kill(pid, signal.SIGKILL)

        eventually(lambda: is_all_new(before, agents(house)), allowed_s(1.0))
        assert time.monotonic() - began < allowed_s(1.0)
        rows = house.ask("status")["processes"]
        assert [row["restarts"] for row in rows if row["kind"] == "agent"] == [1] * 101
        master = house.pid("master")
        eventually(lambda: len([pid for pid in tree.everything() if pid.ppid == master]) == 103)


def is_all_new(before: dict[str, int], after: dict[str, int]) -> bool:
    return after.keys() == before.keys() and not set(after.values()) & set(before.values())


def test_the_status_of_two_hundred_processes_is_told_soon() -> None:
    with tree_of(many(200)) as house:
        house.start()
        assert "ready" in house.wait_ready(60)

        def status_s() -> float:
            began = time.monotonic()
            assert len(house.ask("status")["processes"]) > 200
            return time.monotonic() - began

        assert min(status_s() for _ in range(10)) < allowed_s(0.05)
