"""How much one write transaction takes, and how long the lock then stays free."""

from __future__ import annotations

import asyncio
import time

from hypothesis import given
from hypothesis import strategies as st

from harmonylite.pace import AIM_S, LEAST_BYTES, MOST_BYTES, MOST_MESSAGES, SHORT_S, Pace, free_for


def test_short_locks_let_it_grow_only_where_it_was_the_limit() -> None:
    pace = Pace(messages=4, bytes=10_000)
    pace.held(3, 9_000, AIM_S / 3)
    assert (pace.messages, pace.bytes) == (4, 10_000)
    pace.held(4, 9_000, AIM_S / 3)
    assert (pace.messages, pace.bytes) == (8, 10_000)
    pace.held(3, 12_000, AIM_S / 3)
    assert (pace.messages, pace.bytes) == (8, 20_000)
    pace.held(8, 20_000, 0)  # nothing was applied: nothing is known
    assert (pace.messages, pace.bytes) == (8, 20_000)


def test_a_long_lock_is_not_repeated() -> None:
    pace = Pace(messages=100, bytes=1 << 20)
    pace.held(48, 512_000, 8 * AIM_S)
    assert (pace.messages, pace.bytes) == (6, 64_000)
    pace.held(1, 5_120_000, 1_024 * AIM_S)  # one large transaction says little about the next
    assert (pace.messages, pace.bytes) == (1, 5_000)


@given(st.floats(1e-6, 0.05), st.floats(0, 0.01), st.integers(1, 100_000))
def test_it_settles_where_locks_are_short(per_message_s: float, per_transaction_s: float, message_bytes: int) -> None:
    pace = Pace()
    taken = 0
    for _ in range(60):
        taken = max(1, min(pace.messages, -(-pace.bytes // message_bytes)))
        pace.held(taken, taken * message_bytes, per_transaction_s + taken * per_message_s)
    held = per_transaction_s + taken * per_message_s
    assert taken == 1 or held <= 2 * AIM_S + per_message_s
    full = taken >= MOST_MESSAGES or taken * message_bytes >= MOST_BYTES
    assert full or held >= AIM_S / 4 or taken == 1
    assert 1 <= pace.messages <= MOST_MESSAGES
    assert LEAST_BYTES <= pace.bytes <= MOST_BYTES


def sqlite_waits(free_at: list[tuple[float, float]], began: float) -> float:
    """When SQLite's own busy handler finds a lock that is free in these spans, as sqlite3.c 3.40 has its pauses."""
    pauses = [1, 2, 5, 10, 15, 20, 25, 25, 25, 50, 50, *[100] * 100]
    moment = began
    for pause in pauses:
        if any(since <= moment < until for since, until in free_at):
            return moment - began
        moment += pause / 1000
    raise AssertionError("never")


@given(st.lists(st.floats(SHORT_S, 0.4), min_size=1, max_size=30), st.floats(0, 1))
def test_who_waits_gets_the_lock_when_it_is_let_go(holds: list[float], part: float) -> None:
    """Whatever follows: nobody waits through two transactions."""
    moment = 0.0
    free = []
    for held in holds:
        moment += held
        free.append((moment, moment + free_for(held)))
        moment = free[-1][1]
    began = holds[0] * part
    assert began + sqlite_waits(free, began) < free[0][1]


@given(st.floats(SHORT_S, 1.0))
def test_the_lock_is_free_for_no_longer_than_that_takes(held: float) -> None:
    """What is caught up in the meantime is nothing."""
    assert free_for(held) <= min(held + 0.007, 0.103)


def test_the_next_transaction_waits_until_then() -> None:
    async def main() -> None:
        pace = Pace()
        for held, least in ((0.05, 0.015), (SHORT_S / 2, 0.0)):
            begun = time.monotonic()
            pace.released(held, begun)
            await pace.leave_free()
            assert time.monotonic() - begun >= least
        pace.released(0.02, time.monotonic() - 0.03)  # copying the log, decoding the next one
        begun = time.monotonic()
        await pace.leave_free()
        assert time.monotonic() - begun < 0.005

    asyncio.run(main())
