"""What runs beside replication goes on whatever fails."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from harmonylite import housekeeping
from harmonylite.housekeeping import Housekeeper, _every
from harmonylite.tasks import cancelled


def test_a_job_that_fails_is_done_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        turns = 0
        done = asyncio.Event()

        async def job() -> None:
            nonlocal turns
            turns += 1
            if turns == 4:
                done.set()
            raise RuntimeError("no such table: t")

        opened = asyncio.Event()
        task = asyncio.create_task(_every(0, "audit", job, opened))
        await asyncio.sleep(0.01)
        assert turns == 0
        opened.set()
        await asyncio.wait_for(done.wait(), 5)
        assert not task.done()
        await cancelled(task)
        return turns

    assert asyncio.run(main()) >= 4
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert cast(Any, record).fields["job"] == "audit"


def test_a_task_that_failed_does_not_stop_the_clean_up() -> None:
    async def main() -> None:
        async def fail() -> None:
            raise RuntimeError("failed long ago")

        failed = asyncio.create_task(fail())
        await asyncio.sleep(0)
        await cancelled(failed)
        await cancelled(None)

    asyncio.run(main())


def test_only_another_file_in_its_place_means_a_new_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "CLOCK_S", 0.005)
    database, aside = tmp_path / "app.db", tmp_path / "aside.db"
    database.touch()

    async def main() -> None:
        keeper = Housekeeper.__new__(Housekeeper)
        keeper._db_path = database
        opened, replaced = asyncio.Event(), asyncio.Event()
        opened.set()
        task = asyncio.create_task(keeper._watch_file(opened, replaced.set))
        await asyncio.sleep(0.02)
        database.rename(aside)
        await asyncio.sleep(0.05)
        assert not replaced.is_set()
        aside.rename(database)  # it was only away
        await asyncio.sleep(0.05)
        assert not replaced.is_set()
        other = tmp_path / "backup.db"
        other.touch()
        other.replace(database)
        await asyncio.wait_for(replaced.wait(), 5)
        await cancelled(task)

    asyncio.run(main())
