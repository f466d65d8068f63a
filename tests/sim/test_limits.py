"""Random histories in which the streams cannot hold larger groups for a while: whatever fits is published all the same,
and the rest once the limit is lifted."""

from __future__ import annotations

import pytest

from tests.sim.limits import limited
from tests.sim.soak import smallest
from tests.sim.world import HistoryFailed, run

QUICK_HISTORIES, ALL_HISTORIES = 60, 1_000
SHRINK_SECONDS = 30.0


def run_seed(seed: int) -> None:
    """The history of a seed; its failure is reported as small as it can be made."""
    try:
        run(limited(seed))
    except HistoryFailed as failed:
        raise AssertionError(f"seed {seed}: {smallest(failed, SHRINK_SECONDS)}") from None


@pytest.mark.parametrize("first", range(0, QUICK_HISTORIES, 10))
def test_what_a_stream_cannot_hold_arrives_once_it_can(first: int) -> None:
    for seed in range(first, first + 10):
        run_seed(seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(QUICK_HISTORIES, ALL_HISTORIES, 94))
def test_many_histories_with_limits_converge(first: int) -> None:
    for seed in range(first, first + 94):
        run_seed(seed)
