"""What one connection reads and what it believes of its own groups, with a scripted stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import pytest

from harmonylite.db.database import PositionsLostError
from harmonylite.engine import Packed
from harmonylite.model import Delivery, Position, Undecodable
from harmonylite.observe.metrics import Metrics
from harmonylite.replication import Mode, Progress, Session, Wakeup
from harmonylite.stream.consumer import GapFound
from harmonylite.stream.log import LogError, LogSettings
from harmonylite.stream.publisher import Published

SETTINGS = LogSettings(node_id=1)
OWN = SETTINGS.own_stream


class Client:
    is_connected = False
    is_closed = False
    max_payload = 1 << 20

    def new_inbox(self) -> str:
        return "_INBOX.test"


class Database:
    """An engine that takes note of what it is asked."""

    def __init__(self) -> None:
        self.metrics = Metrics("h", "l")
        self.events: list[str] = []
        self.applied: list[Delivery] = []
        self.loses_positions = False

    async def position(self, stream: str) -> Position | None:
        self.events.append("position")
        return None

    async def apply(self, delivery: Delivery) -> None:
        if self.loses_positions:
            self.loses_positions = False
            raise PositionsLostError("rebuilt")
        self.events.append(f"applied {delivery.position.sequence}")
        self.applied.append(delivery)

    def published(self, packed: Packed) -> None:
        self.events.append(f"published {packed.through}")


class Stream:
    """Reads as scripted; then the end of the connection."""

    def __init__(self, reads: Sequence[Delivery | Exception], read_through: int = 0) -> None:
        self._reads = deque(reads)
        self.read_through = read_through
        self.checked = False
        self.waits: list[float | None] = []

    async def read(self, wait_s: float | None = None) -> Delivery:
        self.waits.append(wait_s)
        found = self._reads.popleft() if self._reads else LogError("the end")
        if isinstance(found, Exception):
            raise found
        self.checked = True
        self.read_through = max(self.read_through, found.position.sequence)
        return found

    async def close(self) -> None:
        pass


def at(sequence: int, *undecodable: int) -> Delivery:
    messages = tuple(Undecodable(each, b"?", "bad") for each in undecodable)
    return Delivery(Position(OWN, "created", sequence), (), messages)


def session(database: Database, mode: Mode | None = None) -> Session:
    made = Session(
        cast(Any, database), cast(Any, Client()), SETTINGS, mode or Mode(), Wakeup(), Progress(), tolerance_ms=60_000
    )
    made._reached = {OWN: asyncio.Event()}
    return made


async def acknowledge(made: Session, through: int, *sequences: int) -> None:
    async def acknowledged() -> Published:
        return Published(OWN, sequences, 1)

    made._in_flight.append((Packed(through, b"", 1, 0, through, False), asyncio.create_task(acknowledged())))
    await made._settle(wait=True)


def test_messages_that_cannot_be_read_are_handed_on_while_a_group_is_open() -> None:
    async def main() -> None:
        database = Database()
        with pytest.raises(LogError):
            await session(database)._follow(cast(Any, Stream([at(5), at(5, 7)])), OWN, 0)
        assert [message.sequence for each in database.applied for message in each.undecodable] == [7]

    asyncio.run(main())


def test_the_end_is_not_reached_before_the_gap_test() -> None:
    async def main() -> None:
        made = session(Database())
        gap = GapFound(OWN, 101, None, "the stream ends at 90, before 100")
        with pytest.raises(GapFound):
            await made._follow(cast(Any, Stream([gap], read_through=100)), OWN, 90)
        assert not made._reached[OWN].is_set()

    asyncio.run(main())


def test_an_empty_stream_is_reached_without_waiting_for_messages() -> None:
    async def main() -> None:
        made, stream = session(Database()), Stream([at(0)])
        with pytest.raises(LogError, match="the end"):
            await made._follow(cast(Any, stream), OWN, 0)
        assert made._reached[OWN].is_set()
        assert stream.waits == [0, None]

    asyncio.run(main())


def test_a_group_is_published_once_it_was_read_back() -> None:
    async def main() -> None:
        database = Database()
        made = session(database)
        await acknowledge(made, 1, 6)
        await acknowledge(made, 2, 7, 9)
        await acknowledge(made, 3, 12)
        assert database.events == []
        with pytest.raises(LogError):
            await made._follow(cast(Any, Stream([at(5), at(6), at(8), at(9)])), OWN, 0)
        # Each after its position was noted: the database never has a watermark that its position does not cover.
        assert database.events == [
            "applied 5", "applied 6", "published 1", "applied 8", "applied 9", "published 2",
        ]  # fmt: skip
        await acknowledge(made, 4, 13)
        assert database.events[-1] == "published 2"

    asyncio.run(main())


def test_a_group_that_was_read_back_before_its_acknowledgement_is_published_with_it() -> None:
    async def main() -> None:
        database = Database()
        made = session(database)
        with pytest.raises(LogError):
            await made._follow(cast(Any, Stream([at(6)])), OWN, 0)
        await acknowledge(made, 1, 6)
        assert database.events == ["applied 6", "published 1"]

    asyncio.run(main())


def test_who_does_not_read_takes_the_acknowledgement_for_it() -> None:
    async def main() -> None:
        database = Database()
        await acknowledge(session(database, Mode(replicate=False)), 1, 6)
        assert database.events == ["published 1"]

    asyncio.run(main())


def test_a_stream_whose_position_was_lost_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        database = Database()
        database.loses_positions = True
        made = session(database)
        begun: list[int] = []

        def consumer(stream: str, position: Position) -> Stream:
            begun.append(position.sequence)
            return Stream([at(8)])

        monkeypatch.setattr(made, "_consumer", consumer)
        state: Any = type("State", (), {"name": OWN, "last_seq": 8})
        with pytest.raises(LogError, match="the end"):
            await made._consume(state)
        assert begun == [0, 0]
        assert database.events == ["position", "position", "applied 8"]

    asyncio.run(main())
