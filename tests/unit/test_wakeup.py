"""The publisher's wake-up call."""

from __future__ import annotations

import asyncio

import pytest

from harmonylite.progress import Wakeup


@pytest.mark.parametrize("turns", range(4))
def test_who_is_woken_and_cancelled_at_once_ends(turns: int) -> None:
    # asyncio.wait_for would swallow that on Python 3.10 and 3.11, and a daemon asked to stop would hang.
    async def publisher(wakeup: Wakeup) -> None:
        while True:
            await wakeup.wait(0.5)

    async def main() -> None:
        wakeup = Wakeup()
        task = asyncio.create_task(publisher(wakeup))
        await asyncio.sleep(0.01)
        wakeup.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=2)
        task.cancel()
        assert done

    asyncio.run(main())


def test_a_commit_is_told_once_and_not_lost_to_one_who_was_cancelled() -> None:
    async def main() -> None:
        wakeup = Wakeup()
        assert not await wakeup.wait(0.0)
        gone = asyncio.create_task(wakeup.wait(None))
        await asyncio.sleep(0)
        gone.cancel()
        wakeup.set()
        await asyncio.gather(gone, return_exceptions=True)
        assert await wakeup.wait(None)
        assert not await wakeup.wait(0.01)

    asyncio.run(main())
