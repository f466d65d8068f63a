"""Something is done once nothing was written for a while, and tried again a few times."""

from __future__ import annotations

import asyncio
import logging

import pytest

from harmonylite import resting
from harmonylite.resting import Resting


class Jobs:
    """Stands for the writer's thread; answers: what each job says, the last one for all that follow."""

    def __init__(self, *answers: bool | BaseException) -> None:
        self._answers = list(answers)
        self.asked: list[bool] = []
        self.enough = asyncio.Event()
        self.wanted = 0

    def __call__(self, last: bool) -> asyncio.Future[bool]:
        self.asked.append(last)
        if len(self.asked) >= self.wanted:
            self.enough.set()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        future = asyncio.get_running_loop().create_future()
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    async def seen(self, count: int) -> list[bool]:
        self.wanted = count
        if len(self.asked) < count:
            self.enough.clear()
            await asyncio.wait_for(self.enough.wait(), 5.0)
        return self.asked


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "REST_S", 0.02)


def test_once_after_many_writes() -> None:
    async def main() -> None:
        jobs = Jobs(True)
        rest = Resting(jobs)
        for _ in range(20):
            rest.wrote()
            await asyncio.sleep(0.002)
        assert await jobs.seen(1) == [False]
        await asyncio.sleep(0.1)
        assert jobs.asked == [False]
        rest.wrote()
        assert await jobs.seen(2) == [False, False]

    asyncio.run(main())


def test_not_while_writing_goes_on() -> None:
    async def main() -> None:
        jobs = Jobs(True)
        rest = Resting(jobs)
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.1
        while loop.time() < until:
            rest.wrote()
            await asyncio.sleep(0)
        assert jobs.asked == []
        assert await jobs.seen(1) == [False]

    asyncio.run(main())


def test_tried_again_until_it_works_or_often_enough() -> None:
    async def main() -> None:
        jobs = Jobs(False, False, True)
        rest = Resting(jobs)
        rest.wrote()
        assert await jobs.seen(3) == [False] * 3
        never = Jobs(False, False, False, True)
        rest = Resting(never)
        rest.wrote()
        assert await never.seen(4) == [False, False, False, True]
        await asyncio.sleep(0.1)
        assert len(jobs.asked) == 3
        assert len(never.asked) == 4

    asyncio.run(main())


def test_an_error_ends_it_until_the_next_write(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        jobs = Jobs(OSError("disk gone"), True)
        rest = Resting(jobs)
        rest.wrote()
        await jobs.seen(1)
        await asyncio.sleep(0.1)
        assert jobs.asked == [False]
        rest.wrote()
        assert await jobs.seen(2) == [False, False]

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert "write-ahead log not copied" in caplog.text


def test_closed_it_starts_nothing() -> None:
    async def main() -> None:
        jobs = Jobs(False)
        rest = Resting(jobs)
        rest.wrote()
        rest.close()
        rest.wrote()
        await asyncio.sleep(0.1)
        assert jobs.asked == []

    asyncio.run(main())
