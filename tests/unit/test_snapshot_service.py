"""What the operator asks of snapshots: above all the way out when nobody has everything any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite import catchup
from harmonylite.catchup import Gap
from harmonylite.config.model import Config
from harmonylite.db.replica import Replica
from harmonylite.observe.control import ControlError
from harmonylite.progress import Progress
from harmonylite.snapshot.service import SnapshotService
from harmonylite.snapshot.stores.base import StoreRefused
from harmonylite.snapshot.workfiles import SnapshotFailed
from tests.unit.snapshot_fakes import STREAM, FakeLink, Lease, Node, Store, opened, stream

TRIMMED = Gap(STREAM, "messages 11 to 99 were discarded", lost=False, needed=99)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "LOOK_S", 0.02)


class Service(SnapshotService):
    """Of a node that is connected."""

    def __init__(self, node: Node, folder: Path, *, publish: bool = True) -> None:
        self.progress = Progress(publishing=publish)
        config = Config(db_path=node.path, publish=publish)
        super().__init__(config, node.engine, self.progress, wake=lambda: None)
        folder.mkdir()
        self.store = Store(folder)
        self.link = FakeLink(self.store, Lease(), lambda: stream(100, 200))
        self._link = self.keeper._link = self.link

    async def force(self) -> object:
        """Waits until it is done."""
        assert await self.handlers()["snapshot-save"]({"force": True}) == {"started": True}
        assert self._saving is not None
        return await asyncio.wait_for(self._saving, 10)

    async def bridge(self, gap: Gap) -> bool:
        """As a session does."""
        return await self._catch_up.bridge(self.link, gap)


@contextlib.asynccontextmanager
async def service(folder: Path, *, publish: bool = True) -> AsyncIterator[tuple[Node, Service]]:
    async with opened(folder / "one") as node:
        await node.at(10)
        yield node, Service(node, folder / "store", publish=publish)


def test_a_node_that_does_not_publish_takes_no_snapshot_and_says_so(tmp_path: Path) -> None:
    """It would wait for ever to be one that may, and no other command were taken meanwhile."""

    async def main() -> None:
        async with service(tmp_path, publish=False) as (node, it):
            await node.engine.write(lambda: node.engine.replica.completeness.note_hole("messages 3 to 5"))
            with pytest.raises(SnapshotFailed, match="publish"):
                await it.force()
            assert node.engine.replica.completeness.incomplete is None

    asyncio.run(main())


def test_forced_before_the_connection_has_found_the_gap(tmp_path: Path) -> None:
    """The link drops now and then: the gap that the operator has read of is found again a moment later."""

    async def main() -> None:
        async with service(tmp_path) as (node, it):
            node.write(1)
            it.progress.catching_up = True
            forced = asyncio.create_task(it.force())
            await asyncio.sleep(0.05)
            assert await asyncio.wait_for(it.bridge(TRIMMED), 5)
            it.progress.catching_up = False
            await forced
            assert len(await it.link.store.list()) == 1
            assert await node.position() == 99

    asyncio.run(main())


def test_why_no_snapshot_can_be_saved_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connected, but there is nothing to copy: it is not the connection that is missing."""

    async def main() -> None:
        async with service(tmp_path) as (_, it):
            save = it.handlers()["snapshot-save"]
            it._link = None
            with pytest.raises(ControlError, match="not connected to NATS"):
                await save({})
            with monkeypatch.context() as patch:
                patch.setattr(Replica, "known_schema", None)
                with pytest.raises(ControlError, match="the database is not open yet"):
                    await save({})
            it._link, it._config = it.link, replace(it._config, db_path=tmp_path / "none.db")
            with pytest.raises(ControlError, match="there is no database yet"):
                await save({})

    asyncio.run(main())


def test_a_metric_tells_how_far_catching_up_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(tmp_path) as (node, it):
            gauge = node.engine.metrics.catch_up_progress
            assert gauge.value == 1, "nothing is under way"
            told = it.state.catch_up("merging snapshot x")
            assert gauge.value == 0
            told(250, 1000)
            assert gauge.value == 0.25
            it.state.catching_up = "waiting for a snapshot"
            it.state.fraction = None
            assert gauge.value == 0, "nobody knows for how long"
            it.state.caught_up()
            assert gauge.value == 1

    asyncio.run(main())


def test_at_its_start_it_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    """And keeps what catching up can use again."""

    async def main() -> None:
        async with service(tmp_path) as (node, it):
            prefix = f".{node.path.name}.harmonylite-"
            left = node.path.with_name(f"{prefix}upload")
            known = "20260102T030405Z-7-1a2b3c4d"
            download = it._files.download(known)
            for path in (left, download):
                path.write_bytes(b"x")
            assert it._files.downloads() == [known]
            it.start()
            assert [path.exists() for path in (left, download, node.path)] == [False, True, True]

    asyncio.run(main())


def test_a_store_that_does_not_answer_concerns_the_operator(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(tmp_path) as (_, it):
            assert it.concerns() == []
            it.store.trouble = StoreRefused("access denied")
            with pytest.raises(StoreRefused):
                await it.keeper.refresh(it.link)
            assert it.concerns() == ["the store of the snapshots cannot be asked: access denied"]
            it.store.trouble = None
            await it.keeper.refresh(it.link)
            assert it.concerns() == []

    asyncio.run(main())
