"""Random histories in which the streams cannot hold larger groups for a while: whatever fits is published all the same,
and the rest once the limit is lifted."""

from __future__ import annotations

import pytest

from tests.sim.limits import limited
from tests.sim.soak import run_as_test

QUICK_HISTORIES, ALL_HISTORIES = 60, 1_000


@pytest.mark.parametrize("first", range(0, QUICK_HISTORIES, 10))
def test_what_a_stream_cannot_hold_arrives_once_it_can(first: int) -> None:
    for seed in range(first, first + 10):
        run_as_test(limited(seed), seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(QUICK_HISTORIES, ALL_HISTORIES, 94))
def test_many_histories_with_limits_converge(first: int) -> None:
    for seed in range(first, first + 94):
        run_as_test(limited(seed), seed)
