"""What the operator is told of the lag, and of what is too large for its stream."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harmonylite.db.schema import Skipped
from harmonylite.report import LAG_LASTS_S, MOST_HELD, Reporter, held_rows, present_lag


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


def test_what_is_held_is_told_as_long_as_it_is_held() -> None:
    refused = {7: "2 rows of item are not published: ..", 9: "one that was sent since"}
    assert list(held_rows({7: 2}, refused)) == ["2 rows of item are not published: .."]
    assert list(held_rows({}, refused)) == []
    # After a restart, before the stream was asked again.
    [text] = held_rows({7: 2, 8: 3}, {})
    assert text.startswith("5 rows of a transaction are not published: the stream could not hold it")


def test_of_thousands_that_are_held_a_few_are_named() -> None:
    *named, rest = held_rows(dict.fromkeys(range(1_000), 1), {batch: f"batch {batch}" for batch in range(1_000)})
    assert named == [f"batch {batch}" for batch in range(MOST_HELD)]
    assert rest == f"{1_000 - MOST_HELD} more transactions are not published: each is larger than its stream"


def test_a_table_that_comes_later_and_is_not_replicated_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def none() -> int:
        return 0

    replica = SimpleNamespace(known_schema=SimpleNamespace(skipped=[Skipped("old", "no primary key")]))
    reporter = Reporter.__new__(Reporter)
    reporter._engine = cast(Any, SimpleNamespace(replica=replica, pending=none, held=none, parked=none))
    reporter._opened, reporter.database_error, reporter._said_skipped = True, None, {}
    asyncio.run(reporter.refresh())
    replica.known_schema.skipped.append(Skipped("new", "no primary key"))
    asyncio.run(reporter.refresh())
    replica.known_schema = None  # a write failed, the schema is read again
    asyncio.run(reporter.refresh())
    assert [cast(Any, record).fields["table"] for record in caplog.records] == ["old", "new"]
