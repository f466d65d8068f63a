"""What runs beside replication goes on whatever fails."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harmonylite import housekeeping
from harmonylite.housekeeping import Housekeeper, _every
from harmonylite.mounts import is_read_only
from harmonylite.progress import Progress
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


def test_a_file_system_that_turns_read_only_is_told_once_and_so_is_its_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(housekeeping, "is_read_only", lambda folder: is_read_only(folder, table))

    class Reporter:
        read_only = False

        def line(self) -> str:
            return "unhealthy" if self.read_only else "online"

    told: list[str] = []
    keeper = Housekeeper.__new__(Housekeeper)
    keeper._db_path = tmp_path / "app.db"
    reporter = Reporter()
    keeper._reporter = cast(Any, reporter)
    keeper._notifier = cast(Any, SimpleNamespace(status=told.append))

    async def main() -> list[bool]:
        seen = []
        for options in ("rw,errors=remount-ro", "ro,errors=remount-ro", "ro", "rw,emergency_ro", "rw"):
            table.write_text(f"22 1 179:2 / / rw,noatime - ext4 /dev/mmcblk0p2 {options}\n")
            await keeper._look_at_disk()
            seen.append(reporter.read_only)
        return seen

    with caplog.at_level(logging.INFO, housekeeping.__name__):
        assert asyncio.run(main()) == [False, True, True, True, False]
    assert told == ["unhealthy", "online"]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "the database's file system is read-only; nothing can be written"),
        ("WARNING", "the database's file system can be written again"),
    ]


@pytest.mark.parametrize(
    ("connected", "in_step", "forgotten"), [(True, True, [3, 2, 0]), (True, False, []), (False, True, [])]
)
def test_tombstones_are_forgotten_only_while_everything_was_read(
    connected: bool, in_step: bool, forgotten: list[int]
) -> None:
    """A log that is new is filled again with them; a row that arrives may be older than one of them."""
    left, pruned = [3, 2, 0], []

    class Engine:
        time = SimpleNamespace(server=SimpleNamespace(now_ms=lambda: 1))

        async def prune(self, server_ms: int) -> int:
            pruned.append(left.pop(0))
            return pruned[-1]

    keeper = _keeper(Engine(), Progress(in_step=in_step), connected=connected)
    asyncio.run(keeper._forget_tombstones())
    assert pruned == forgotten


def _keeper(engine: object, progress: Progress, *, connected: bool = True) -> Housekeeper:
    """With no more than the tombstones take."""
    keeper = Housekeeper.__new__(Housekeeper)
    keeper._engine = cast(Any, engine)
    keeper._connection = cast(Any, SimpleNamespace(connected=connected))
    keeper._progress = progress
    keeper._tombstones_due_s = 0.0
    return keeper


def test_a_device_that_is_never_on_for_an_hour_forgets_tombstones_as_soon_as_it_is_in_step() -> None:
    looks = []

    class Engine:
        time = SimpleNamespace(server=SimpleNamespace(now_ms=lambda: 1))

        async def prune(self, server_ms: int) -> int:
            looks.append(server_ms)
            return 0

    progress = Progress(in_step=False)
    keeper = _keeper(Engine(), progress)
    asyncio.run(keeper._forget_tombstones())
    assert not looks
    progress.in_step = True
    for _ in range(3):
        asyncio.run(keeper._forget_tombstones())
    assert len(looks) == 1, "once an hour is enough"
    assert housekeeping.TOMBSTONES_S < 300 < housekeeping.HOURLY_S


def test_forgetting_ends_with_the_connection() -> None:
    progress = Progress(in_step=True)
    pruned = []

    class Engine:
        time = SimpleNamespace(server=SimpleNamespace(now_ms=lambda: 1))

        async def prune(self, server_ms: int) -> int:
            pruned.append(server_ms)
            progress.in_step = False
            return 2_000 if len(pruned) < 3 else 0

    keeper = _keeper(Engine(), progress)
    asyncio.run(keeper._forget_tombstones())
    assert pruned == [1]
