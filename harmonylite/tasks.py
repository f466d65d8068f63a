"""Small asyncio tools (Python 3.10 has no TaskGroup)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


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


async def undisturbed(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a library's coroutine in a task of its own, so that a cancellation of ours is always felt.

    Before Python 3.12 `asyncio.wait_for`, which nats-py uses throughout, answers a cancellation that comes together
    with the result by returning the result: the caller would go on, and whoever stops it would wait for ever.
    """
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        task.add_done_callback(_forget)
        raise
    return task.result()


def _forget(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def while_waiting(
    coroutine: Coroutine[Any, Any, T], interval_s: float, step: Callable[[], Awaitable[object]]
) -> T:
    """Await the coroutine; as long as it takes, do a step every `interval_s`."""
    task = asyncio.ensure_future(coroutine)
    try:
        while not (await asyncio.wait([task], timeout=interval_s))[0]:
            await step()
        return task.result()
    finally:
        await cancelled(task)


async def wait_for(event: asyncio.Event) -> None:
    """Wait until it is set: for `run_together`."""
    await event.wait()


async def wait_first(*events: asyncio.Event, timeout_s: float | None = None) -> bool:
    """Wait until one of the events is set; False if none was in time."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()
