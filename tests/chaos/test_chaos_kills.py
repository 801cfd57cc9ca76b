"""Random kills under load, and events that take their process down."""

import time

import pytest
from chaos_content import Row
from chaos_kills import run
from chaos_oracle import content_of, drain, problems
from chaos_tree import Load, Tree, complaints, eventually, instance, kill


@pytest.mark.parametrize("seed", [1])
def test_twenty_attacks_under_load_leave_everything_exact(seed: int) -> None:
    report = run(20, seed)

    assert report.problems == [], report
    assert report.complaints == [], report
    assert report.events > 500, report


def letters(made: Tree) -> list[Row]:
    content = content_of(made)
    try:
        return content.dead_letters()
    finally:
        content.close()


def test_an_event_that_takes_its_process_down_is_parked_and_the_others_go_on() -> None:
    with instance() as made:
        made.start()
        with Load(made, seed=4, pause_s=0.04) as load:
            for how in ("exit", "segfault"):
                load.spoil(how)
                parked = eventually(
                    lambda: [r for r in letters(made) if r["value"]["how"] == how],  # noqa: B023
                    f"{how} is parked",
                    30.0,
                )
                assert (
                    parked[0]["headers"]["streamd-reason"]
                    == b"it took its process down 3 times"
                )
                time.sleep(1.5)  # what the process does now is progress: crashes are forgiven
        drain(made)
        made.stop()
        assert problems(made, load.acked) == []


def test_a_stop_while_a_new_zygote_imports_is_quiet() -> None:
    with instance() as made:
        made.start()
        assert kill(made.processes()["zygote"])
        made.stop()
        assert complaints(made) == []
