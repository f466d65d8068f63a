"""What the operator is told of the lag."""

from __future__ import annotations

import pytest

from harmonylite.report import LAG_LASTS_S, present_lag


@pytest.mark.parametrize(
    ("last_s", "age_s", "behind", "shown"),
    [
        (None, 0.0, False, None),
        (48.0, LAG_LASTS_S / 2, False, 48.0),
        # Old rows that were caught up with long ago are no lag now.
        (48.0, LAG_LASTS_S * 2, False, 0.0),
        (48.0, LAG_LASTS_S * 2, True, 48.0),
    ],
)
def test_a_lag_is_shown_while_it_lasts(last_s: float | None, age_s: float, behind: bool, shown: float | None) -> None:
    assert present_lag(last_s, age_s, behind=behind) == shown
