"""Whoever is killed, stopped or fails at any step of the work: words and money stay exact."""

import itertools
import time

import pytest
from chaos_oracle import drain, problems
from chaos_tree import Load, Tree, complaints, eventually, instance, kill

from streamd.failpoints import FAILPOINTS

OF_THE_MASTER = [name for name in FAILPOINTS if name.startswith("master.")]
AT_THE_STOP = ["checkpoint.before-truncate"]  # no tick leaves the log idle
# The zygote's are passed by what it forks, which counts anew.
ONCE_A_PROCESS = ("open", "load", "engine", "zygote")
OF_KAFKA = [name for name in FAILPOINTS if name.startswith("kafka.")]
OTHERS = [name for name in FAILPOINTS if name not in OF_THE_MASTER + AT_THE_STOP + OF_KAFKA]


def armed(*parts: str) -> dict[str, str]:
    return {"STREAMD_TEST": "1", "STREAMD_FAILPOINT": ",".join(parts)}


def assert_exact(made: Tree, load: Load) -> None:
    drain(made)
    made.stop()
    assert problems(made, load.acked) == []


def test_a_kill_at_each_failpoint_costs_nothing_and_doubles_nothing() -> None:
    nth = itertools.cycle((1, 2, 3))
    parts = [
        f"{name}:{1 if name.startswith(ONCE_A_PROCESS) else next(nth)}:kill"
        for name in OTHERS + AT_THE_STOP
    ]
    with instance() as made:
        made.start(**armed(*parts))
        with Load(made, seed=1, pause_s=0.04) as load:
            load.spoil("once")
            for name in OTHERS:
                eventually(lambda: made.fired(name), name, 30.0)  # noqa: B023
            batches = load.batches
            eventually(lambda: load.batches > batches + 5, "events flow in the end")
        assert_exact(made, load)
        assert all(made.fired(name) for name in AT_THE_STOP)
        assert complaints(made) == []


def test_a_master_killed_at_any_step_leaves_nothing_and_the_next_goes_on() -> None:
    with instance() as made:
        made.start()
        with Load(made, seed=2) as load:
            for name in OF_THE_MASTER:
                batches = load.batches
                eventually(lambda: load.batches > batches + 3, "events flow")  # noqa: B023
                made.stop()
                code = made.start(**armed(f"{name}:1:kill"))
                if name == "master.on-exit":
                    kill(made.processes()["bank#0"])
                elif name == "master.stopping":
                    made.command("stop")
                else:
                    assert code == 70
                eventually(lambda: made.fired(name), name)  # noqa: B023
                made.assert_nothing_left()
                made.start()
        assert_exact(made, load)


@pytest.mark.parametrize(
    "part",
    [
        "commit.after-begin:6:stop",  # holds up everybody
        "commit.before-turnstile:6:stop",  # found by its beat
        "checkpoint.after-take:4:exit",
        "commit.before-commit:5:raise",
    ],
)
def test_who_stops_or_fails_at_a_failpoint_is_replaced(part: str) -> None:
    name = part.partition(":")[0]
    with instance() as made:
        made.start(**armed(part))
        with Load(made, seed=3, pause_s=0.04) as load:
            eventually(lambda: made.fired(name), name)
            time.sleep(0.1)
            batches = load.batches
            eventually(lambda: load.batches > batches + 5, "events flow again", 20.0)
        assert_exact(made, load)
