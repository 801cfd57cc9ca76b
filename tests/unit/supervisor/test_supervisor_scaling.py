"""How many processes a group may have and should have, with the clock as an argument."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.errors import UsageError
from streamd.supervisor.scaling import (
    LATE_HOLD_S,
    QUIET_HOLD_S,
    REST_S,
    AutoScale,
    Load,
    check_size,
    most_processes,
    next_to_grow,
    next_to_shrink,
)
from streamd.wire import AgentInfo, GroupInfo, Hello, TableInfo, TopicInfo

DAY_S = 24 * 3600


def hello(partitions: int = 4) -> Hello:
    agent = AgentInfo("proj.count", "count", ["words"], 1, "retry", "")
    return Hello(
        app_id="proj",
        origin="proj:app",
        groups=[
            GroupInfo("count", [agent], ["counts"], 1, "one agent"),
            GroupInfo("app", [], [], 1, "tasks"),
        ],
        topics=[TopicInfo("words", partitions, False, None, "str", "str")],
        tables=[TableInfo("counts", "count", partitions, "", "raw", "str", "str", "int")],
        timers=[],
        routes=[],
        models=[],
        settings={},
        settings_shown=[],
        warnings=[],
    )


def test_a_group_has_at_most_as_many_processes_as_partitions() -> None:
    assert most_processes(hello(6), "count") == 6
    assert most_processes(hello(), "app") == 1
    assert most_processes(hello(), "nobody") == 0


@pytest.mark.parametrize(
    ("group", "processes", "text"),
    [
        ("nobody", 1, "there is no group 'nobody'"),
        ("count", 0, "1 process or more, not 0"),
        ("count", 5, "count cannot have 5 processes: its topics have 4 partitions"),
        ("app", 2, "its tasks, timers and pages run in one process"),
    ],
)
def test_a_size_that_cannot_be_is_refused_in_a_sentence(
    group: str, processes: int, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        check_size(hello(), group, processes)


def test_the_group_furthest_behind_grows_and_the_largest_shrinks() -> None:
    loads = [
        Load("full", 2, 2, behind=900),
        Load("late", 1, 4, behind=500),
        Load("well", 3, 4, behind=0),
    ]

    grown, shrunk = next_to_grow(loads), next_to_shrink(loads)

    assert grown is not None and grown.group == "late"
    assert shrunk is not None and shrunk.group == "well"
    assert next_to_grow([Load("full", 2, 2)]) is None
    assert next_to_shrink([Load("one", 1, 2)]) is None


class World:
    """A group whose processes do `capacity` events a second each, second by second."""

    def __init__(self, capacity: float, most: int, least: int = 1) -> None:
        self.auto = AutoScale()
        self.processes = least
        self.now = 0.0
        self.behind = 0.0
        self.steps: list[tuple[float, int, str]] = []
        self._capacity, self._least, self._most = capacity, least, most

    def second(self, arrive: float, *, capacity: float | None = None) -> None:
        able = (self._capacity * self.processes) if capacity is None else capacity
        done = min(self.behind + arrive, able)
        self.behind += arrive - done
        self.now += 1.0
        load = Load("g", self.processes, 16, int(self.behind), done)
        step = self.auto.decide(load, least=self._least, most=self._most, now=self.now)
        if step is not None:
            self.processes = step.processes
            self.steps.append((self.now, step.processes, step.reason))


def test_a_day_of_waves_is_followed_and_nothing_flutters() -> None:
    world = World(capacity=1000.0, most=8)
    noon, midnight, longest_s = 0, 99, 0.0
    for second in range(DAY_S):
        wave = (1 - math.cos(2 * math.pi * second / DAY_S)) / 2  # 0 at midnight, 1 at noon
        world.second(100 + 5000 * wave)
        longest_s = max(longest_s, world.behind / 1000.0 / world.processes)
        if second == DAY_S // 2:
            noon = world.processes
        if second == DAY_S - 1:
            midnight = world.processes

    assert noon >= 6
    assert midnight == 1
    assert longest_s < 30.0
    assert len(world.steps) <= 12
    sizes = [1, *(processes for _, processes, _ in world.steps)]
    turns = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
    assert sum(a * b < 0 for a, b in zip(turns, turns[1:], strict=False)) == 1


def test_a_burst_that_is_over_soon_changes_nothing() -> None:
    world = World(capacity=1000.0, most=8)

    for second in range(600):
        world.second(3000 if second % 60 == 0 else 100)

    assert world.steps == []


def test_a_steady_load_settles_at_one_number() -> None:
    world = World(capacity=1000.0, most=8)

    for _ in range(6 * 3600):
        world.second(2500)

    assert world.processes in (3, 4)
    assert len(world.steps) <= 3
    assert world.behind < 1000


def test_growth_that_brings_nothing_is_taken_back() -> None:
    # What it waits for does 500 events a second, whoever asks.
    world = World(capacity=1000.0, most=8)

    for _ in range(300):
        world.second(600, capacity=500.0)

    assert [processes for _, processes, _ in world.steps] == [2, 1]
    assert world.steps[1][2] == "more processes did not help"


def test_a_group_that_stands_still_is_left_alone() -> None:
    world = World(capacity=1000.0, most=8)

    for _ in range(600):
        world.second(1000, capacity=0.0)

    assert world.steps == []


def test_more_comes_after_a_while_and_less_after_a_longer_one() -> None:
    world = World(capacity=100.0, most=2)
    while not world.steps:
        world.second(200)
    up_at = world.now
    while len(world.steps) < 2:
        world.second(0)

    assert LATE_HOLD_S <= up_at < LATE_HOLD_S + 10
    assert world.now - up_at >= REST_S + QUIET_HOLD_S
    assert world.processes == 1


def test_bounds_that_changed_are_obeyed_at_once() -> None:
    load = Load("g", 5, 8)

    step = AutoScale().decide(load, least=1, most=3, now=1.0)

    assert step is not None and step.processes == 3


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**9)), max_size=200),
    st.integers(1, 3),
    st.integers(3, 9),
)
def test_whatever_the_figures_are_the_bounds_hold(
    figures: list[tuple[float, int]], least: int, most: int
) -> None:
    auto, processes = AutoScale(), least
    for second, (rate, behind) in enumerate(figures):
        load = Load("g", processes, most, behind, rate)
        step = auto.decide(load, least=least, most=most, now=5.0 * second)
        if step is not None:
            processes = step.processes
        assert least <= processes <= most
