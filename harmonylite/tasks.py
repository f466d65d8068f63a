"""Small asyncio tools (Python 3.10 has no TaskGroup)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all until the first ends or fails; the others are cancelled and waited for, also when we are.

    Raises what the first failure raised.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def cancelled(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait until it is gone; how it ended is not told, so that the caller's clean-up goes on."""
    if task is None:
        return
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def wait_first(*events: asyncio.Event, timeout_s: float | None = None) -> bool:
    """Wait until one of the events is set; False if none was in time."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()
