"""How much one write transaction takes, and how long the lock then stays free."""

from __future__ import annotations

import asyncio
import time

from hypothesis import given
from hypothesis import strategies as st

from harmonylite.pace import AIM_S, LEAST_BYTES, MOST_BYTES, MOST_MESSAGES, SHORT_S, Pace


def test_short_locks_let_it_grow_only_where_it_was_the_limit() -> None:
    pace = Pace(messages=4, bytes=10_000)
    pace.held(3, 9_000, AIM_S / 2)
    assert (pace.messages, pace.bytes) == (4, 10_000)
    pace.held(4, 9_000, AIM_S / 2)
    assert (pace.messages, pace.bytes) == (8, 10_000)
    pace.held(3, 12_000, AIM_S / 2)
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


def test_the_lock_stays_free_as_long_as_it_was_held() -> None:
    async def main() -> None:
        pace = Pace()
        for held, least in ((0.05, 0.045), (SHORT_S / 2, 0.0)):
            pace.released(held)
            begun = time.monotonic()
            await pace.leave_free()
            assert time.monotonic() - begun >= least
        begun = time.monotonic()
        pace.released(0.02)
        await asyncio.sleep(0.03)  # decoding the next one, say
        await pace.leave_free()
        assert time.monotonic() - begun < 0.2

    asyncio.run(main())
