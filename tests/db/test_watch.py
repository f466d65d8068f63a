"""Who is woken by commits, and when the database's folder comes late."""

from __future__ import annotations

import asyncio
from pathlib import Path

import apsw
import pytest

from harmonylite.db import watch
from harmonylite.db.watch import Watch


def test_a_folder_that_comes_later_is_watched_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk was not mounted yet; without inotify, an idle database would be looked at for ever."""
    monkeypatch.setattr(watch, "DIRECTORY_S", 0.01)

    async def main() -> None:
        path = tmp_path / "disk" / "app.db"
        changes = asyncio.Semaphore(0)
        watching = Watch(path, changes.release)
        watching.start()
        try:
            assert watching._descriptor is None
            path.parent.mkdir()
            await asyncio.wait_for(changes.acquire(), 5)
            assert watching._descriptor is not None
            assert watching._poller is None
            while not changes.locked():
                await changes.acquire()
            application = apsw.Connection(str(path))
            application.execute("PRAGMA journal_mode=WAL; CREATE TABLE t (id INTEGER PRIMARY KEY)")
            await asyncio.wait_for(changes.acquire(), 5)
            application.close()
        finally:
            await watching.close()

    asyncio.run(main())


def test_one_whose_folder_never_comes_is_closed(tmp_path: Path) -> None:
    async def main() -> None:
        watching = Watch(tmp_path / "never" / "app.db", lambda: None)
        watching.start()
        await asyncio.sleep(0)
        await watching.close()

    asyncio.run(main())
