"""A kill at every failpoint, each once: in the end every table and topic is exact.

Several failpoints are armed in one tree; each acts once in it, on whichever process passes it
for the nth time. Those of the master end the tree, so each of them has one of its own.
"""

from functools import partial

import pytest
from chaos_tree import Load, Tree, drain, eventually, instance, problems

from streamd.failpoints import FAILPOINTS

# Struck in tests/process/test_log_process.py, which makes the log keep house.
HOUSEKEEPING = {"trim.before-commit", "checkpoint.before-truncate"}
MASTER = [name for name in FAILPOINTS if name.startswith("master.")]
OTHERS = [name for name in FAILPOINTS if name not in HOUSEKEEPING and name not in MASTER]
ROUNDS = 4


def nth(name: str) -> int:
    """Which pass is struck: what a process passes once, its first; else one in the midst."""
    return 3 if name.startswith(("commit.", "checkpoint.")) else 1


def settle(made: Tree, load: Load) -> None:
    """Let events flow once more, drain, stop and compare."""
    before = load.batches
    eventually(lambda: load.batches > before + 2, "events flow in the end", 30.0)


@pytest.mark.parametrize("round", range(ROUNDS))
def test_a_kill_at_each_step_of_a_process_leaves_everything_exact(round: int) -> None:
    armed = OTHERS[round::ROUNDS]
    with instance() as made:
        text = ",".join(f"{name}:{nth(name)}:kill" for name in armed)

        made.start(STREAMD_TEST="1", STREAMD_FAILPOINT=text)
        with Load(made, seed=round) as load:
            for name in armed:
                # What is passed only when a process starts is passed by the next one.
                eventually(partial(made.fired, name), f"{name} acts", 30.0)
            settle(made, load)
        eventually(lambda: made.state() == "running", "all runs in the end", 30.0)
        drain(made)
        made.stop()

        assert problems(made, load.acked) == []


@pytest.mark.parametrize("name", MASTER)
def test_a_kill_of_the_master_at_each_step_leaves_everything_exact(name: str) -> None:
    with instance() as made:
        made.start()
        with Load(made, seed=1) as load:
            eventually(lambda: load.batches > 2, "events flow")
            made.stop()
            made.start(STREAMD_TEST="1", STREAMD_FAILPOINT=f"{name}:1:kill")
            if name == "master.on-exit":
                made.kill_one_agent()
            if name == "master.stopping":
                made.command("stop")
            eventually(lambda: made.fired(name), f"{name} acts", 10.0)
            made.assert_nothing_left()
            made.start()
            settle(made, load)
        drain(made)
        made.stop()

        assert problems(made, load.acked) == []


def test_every_failpoint_is_struck() -> None:
    assert set(MASTER) | set(OTHERS) | HOUSEKEEPING == set(FAILPOINTS)
