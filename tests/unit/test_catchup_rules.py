"""Rules of catching up that the simulation does not reach, each small enough to stand alone (docs/simulation.md)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from harmonylite import replication
from harmonylite.db.marking import Marking
from harmonylite.model import Position
from harmonylite.snapshot import local
from harmonylite.snapshot.choice import why_unusable
from harmonylite.snapshot.manifest import Manifest
from harmonylite.stream.log import LogSettings
from tests.unit.snapshot_fakes import CREATED, STREAM, opened, stream
from tests.unit.test_session import Database, session

# Below this many waiting rows nobody hesitates, above it all do.
FEW, MANY = replication.FEW_ROWS, replication.FEW_ROWS + 1


def manifest_at(*positions: Position) -> Manifest:
    return Manifest(
        id="20261124T070000Z-1-00000000",
        node_id=1,
        version="1",
        created_ms=0,
        positions=positions,
        schema="schema",
        size=1,
        stored_size=1,
        sha256="0" * 64,
        tombstones_since_ms=0,
    )


@pytest.mark.parametrize(
    ("position", "needed", "reason"),
    [
        (Position(STREAM, CREATED, 12, 0), 12, None),
        (Position(STREAM, CREATED, 12, 0), 13, "it ends at 12 of stream harmonylite-changes-1, 13 is needed"),
        (Position(STREAM, CREATED, 10, 0), 0, None),
        (Position(STREAM, CREATED, 9, 0), 0, "messages 10 to 10 were discarded"),
        (Position(STREAM, CREATED, 20, 0), 0, None),
        (Position(STREAM, CREATED, 21, 0), 0, "the stream ends at 20"),
        (Position(STREAM, "2025-01-01T00:00:00Z", 12, 0), 0, "created anew"),
        (Position("another", CREATED, 12, 0), 0, "it knows nothing of stream harmonylite-changes-1"),
    ],
)
def test_a_snapshot_is_of_use_if_the_stream_goes_on_where_it_ends(
    position: Position, needed: int, reason: str | None
) -> None:
    """The stream holds messages 11 to 20."""
    no_client = cast(Any, None)  # the time of no message is asked for: the positions do not know theirs
    states, missing = {STREAM: stream(11, 20)}, {STREAM: needed}
    found = asyncio.run(why_unusable(no_client, LogSettings(1), manifest_at(position), states, missing))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_the_position_moves_when_all_rows_are_marked_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is killed half-way finds the same gap again."""

    class Dies(Marking):
        def step(self) -> bool:
            if self.looked_at:
                raise InterruptedError
            return super().step()

    async def main() -> None:
        async with opened(tmp_path) as node:
            node.write(1, 2, 3)
            await node.engine.write(node.engine.replica.absorb)
            await node.at(100)
            with monkeypatch.context() as patch, pytest.raises(InterruptedError):
                patch.setattr(local, "Marking", Dies)
                patch.setattr("harmonylite.db.marking.MARK_ROWS", 1)
                await local.publish_again(node.engine, Position(STREAM, CREATED, 7, 0), lambda done, total: None)
            assert await node.position() == 100
            await local.publish_again(node.engine, Position(STREAM, CREATED, 7, 0), lambda done, total: None)
            assert await node.position() == 7

    asyncio.run(main())


@pytest.mark.parametrize(
    ("log_was_lost", "pending", "hesitates"), [(True, MANY, True), (True, FEW, False), (False, MANY, False)]
)
def test_after_a_lost_log_not_everybody_publishes_everything_at_once(
    monkeypatch: pytest.MonkeyPatch, log_was_lost: bool, pending: int, hesitates: bool
) -> None:
    """What one node has published meanwhile the others need not: their marks are dropped."""
    events: list[object] = []

    class Pending(Database):
        async def pending(self, *, held: bool = True) -> int:
            return pending

    class Publishing:
        async def run(self) -> None:
            events.append("published")

    def uniform(least: float, most: float) -> float:
        events.append((least, most))
        return 0.0

    made = session(Pending())
    made._reached = {}
    made._hesitates = log_was_lost
    made._publishing = cast(Any, Publishing())
    monkeypatch.setattr("harmonylite.replication.random.uniform", uniform)
    asyncio.run(made._publish())
    assert events == ([(0, replication.HESITATION_S)] if hesitates else []) + ["published"]
