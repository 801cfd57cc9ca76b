"""Random attacks under load, short; `scripts/chaos kills` runs more of them."""

import chaos_kills
import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_of_everything_leave_everything_exact(seed: int) -> None:
    report = chaos_kills.run(20, seed)

    assert report.problems == []
    assert report.complaints == []
