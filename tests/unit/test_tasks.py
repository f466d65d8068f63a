"""Tasks end when they are told to, whatever a library does with the cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harmonylite.stream.log import LogSettings, api_request
from harmonylite.tasks import run_together, undisturbed


class Library:
    """Waits for its answers as nats-py does; the answer and the caller's cancellation come in one step of the loop."""

    is_connected = True

    def __init__(self) -> None:
        self.caller: asyncio.Task[Any] | None = None

    async def request(self, *_: object, **__: object) -> Any:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()

        def both() -> None:
            answer.set_result(_Answer())
            assert self.caller is not None
            self.caller.cancel()

        loop.call_later(0.01, both)
        return await asyncio.wait_for(answer, 5)


class _Answer:
    data = b"{}"


def test_a_cancellation_that_comes_with_an_answer_is_felt() -> None:
    """Before Python 3.12 `wait_for` returns the answer instead, and the one who cancelled waits for ever."""

    async def ask_for_ever(library: Library) -> None:
        while True:
            await api_request(library, LogSettings(node_id=1), "STREAM.INFO.x")  # type: ignore[arg-type]

    async def scenario() -> None:
        library = Library()
        library.caller = asyncio.create_task(ask_for_ever(library))
        await asyncio.wait([library.caller], timeout=2)
        assert library.caller.cancelled()

    asyncio.run(scenario())


def test_undisturbed_returns_and_raises_what_the_coroutine_does() -> None:
    async def fine() -> int:
        return 7

    async def broken() -> int:
        raise KeyError("x")

    assert asyncio.run(undisturbed(fine())) == 7
    with pytest.raises(KeyError):
        asyncio.run(undisturbed(broken()))


def test_the_first_failure_of_several_is_raised_and_the_others_are_gone() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("endless")

    async def failing() -> None:
        await asyncio.sleep(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(run_together(endless(), failing()))
    assert ended == ["endless"]
