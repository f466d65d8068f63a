"""What one connection reads and what it believes of its own groups, with a scripted stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from harmonylite import clock, replication
from harmonylite.catchup import Gap
from harmonylite.db.database import PositionsLostError
from harmonylite.model import Delivery, Position, Undecodable
from harmonylite.observe.metrics import Metrics
from harmonylite.pace import AIM_S, Pace
from harmonylite.packing import Packed
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.replication import BeginAgain, Session
from harmonylite.stream.consumer import GapFound
from harmonylite.stream.log import LogError, LogSettings, StreamState
from harmonylite.stream.publisher import Published
from harmonylite.stream.pull import PULL_EXPIRES_S
from harmonylite.timekeeping import Timekeeper

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

    at: Position | None = None

    def __init__(self) -> None:
        self.metrics = Metrics("h", "l")
        self.events: list[str] = []
        self.applied: list[Delivery] = []
        self.loses_positions = False
        self.replica = self.outgoing = self.completeness = self
        self.pace = Pace(messages=4, bytes=64_000)
        self.apply_held_s = 0.0

    def limit_groups(self, group_bytes: int) -> None:
        self.events.append(f"groups up to {group_bytes}")

    async def position(self, stream: str) -> Position | None:
        self.events.append("position")
        return self.at

    async def write(self, job: Callable[[], object]) -> object:
        return job()

    incomplete: str | None = None
    unread_messages = 0

    def note_hole(self, text: str, end: Position) -> None:
        self.incomplete = text
        self.events.append(f"hole noted up to {end.sequence}")

    async def start_over(self, position: Position) -> None:
        self.events.append(f"started over at {position.sequence}")

    async def move_position(self, position: Position) -> None:
        self.events.append(f"moved {position.sequence}")

    async def apply(self, delivery: Delivery) -> None:
        if self.loses_positions:
            self.loses_positions = False
            raise PositionsLostError("rebuilt")
        self.events.append(f"applied {delivery.position.sequence}")
        self.applied.append(delivery)

    async def published(self, packed: Packed) -> None:
        self.events.append(f"published {packed.through}")


class ServerTime:
    """The server's clock is not known."""

    @property
    def server(self) -> ServerTime:
        return self

    def now_ms(self) -> None:
        return None


class Stream:
    """Reads as scripted; then the end of the connection."""

    def __init__(self, reads: Sequence[Delivery | Exception], read_through: int = 0) -> None:
        self._reads = deque(reads)
        self.read_through = read_through
        self.checked = False
        self.waits: list[float] = []
        self.asked: list[tuple[int, int]] = []
        self.taken = (1, 100)

    async def read(self, *, max_messages: int, max_bytes: int, wait_s: float) -> Delivery:
        self.waits.append(wait_s)
        self.asked.append((max_messages, max_bytes))
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

    group = Packed(through, b"", 1, 0, through, False, lo=through, hi=through)
    made._publishing._in_flight.append((group, asyncio.create_task(acknowledged())))
    await made._publishing._settle(wait=True)


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
        assert stream.waits == [0, PULL_EXPIRES_S]

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


class Outbox(Database):
    """Takes note of when what is pending is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def pending(self, *, held: bool = True) -> int:
        return 0

    async def held(self) -> dict[int, int]:
        return {}

    async def take_outgoing(self, after: int) -> list[Packed]:
        self.events.append("taken from the outbox")
        self.asked.set()
        return []

    async def release(self) -> None:
        pass


class SlowStream(Stream):
    """Everything else that can go on does so before each read; it ends when the outbox was asked."""

    def __init__(self, reads: Sequence[Delivery | Exception], asked: asyncio.Event) -> None:
        super().__init__(reads)
        self._asked = asked

    async def read(self, *, max_messages: int, max_bytes: int, wait_s: float) -> Delivery:
        for _ in range(100):
            await asyncio.sleep(0)
        if not self._reads:
            await self._asked.wait()
        return await super().read(max_messages=max_messages, max_bytes=max_bytes, wait_s=wait_s)


def test_what_follows_in_an_emptied_log_is_durable_at_once() -> None:
    """A noted position is lost with a kill; then nothing tells that the log is still the one that was emptied."""

    async def main() -> None:
        database = Database()
        made = session(database)
        made._progress.emptied[OWN] = Position(OWN, "created", 1, 1_000)
        with pytest.raises(LogError):
            await made._follow(cast(Any, Stream([at(1), at(2), at(3)])), OWN, 0)
        assert database.events == ["applied 1", "applied 2", "position", "applied 3"]

    asyncio.run(main())


def test_i3_nothing_is_published_before_the_stream_was_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pending may have been beaten or deleted since: it would come back elsewhere."""

    async def nothing(*_: object) -> None:
        pass

    async def streams() -> tuple[StreamState, ...]:
        return (state(1, 2),)

    async def main() -> None:
        database = Outbox()
        made = session(database, Mode(publish=True, replicate=True))
        stream = SlowStream([at(1), at(2)], database.asked)
        monkeypatch.setattr(replication, "read_again", nothing)
        monkeypatch.setattr(made, "_open_streams", streams)
        monkeypatch.setattr(made, "_consumer", lambda *_: stream)
        with pytest.raises(LogError, match="the end"):
            await made.run()
        first = database.events.index("taken from the outbox")
        assert database.events[:first] == ["position", "applied 1", "applied 2"]

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


def test_reading_begins_when_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the position as it is then: what was waited for moves it."""

    async def main() -> None:
        database, may = Database(), asyncio.Event()

        async def may_read() -> None:
            await may.wait()

        made = Session(
            *(cast(Any, database), cast(Any, Client()), SETTINGS, Mode(), Wakeup(), Progress()),
            tolerance_ms=60_000,
            may_read=may_read,
        )
        begun: list[int] = []

        def consumer(stream: str, position: Position) -> Stream:
            begun.append(position.sequence)
            return Stream([])

        monkeypatch.setattr(made, "_consumer", consumer)
        state: Any = type("State", (), {"name": OWN, "last_seq": 8})
        consuming = asyncio.ensure_future(made._consume(state))
        await asyncio.sleep(0.01)
        assert database.events == []
        database.at = Position(OWN, "created", 7)
        may.set()
        with pytest.raises(LogError, match="the end"):
            await consuming
        assert begun == [7]

    asyncio.run(main())


def test_what_is_read_at_a_time_follows_how_long_the_lock_was_held() -> None:
    async def main() -> None:
        database = Database()
        made, stream = session(database), Stream([at(1), at(2), at(3)])
        stream.taken = (4, 64_000)
        database.apply_held_s = 4 * AIM_S
        with pytest.raises(LogError):
            await made._follow(cast(Any, stream), OWN, 0)
        assert stream.asked[:3] == [(4, 64_000), (1, 16_000), (1, 16_000)]

    asyncio.run(main())


def test_it_looks_now_and_then_whether_what_was_too_large_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        made = session(Database())

        async def look() -> None:
            raise LogError("looked")

        monkeypatch.setattr(replication, "CLOCK_INTERVAL_S", 0.0)
        monkeypatch.setattr(made._engine, "time", ServerTime(), raising=False)
        monkeypatch.setattr(made._publishing, "look_at_held", look)
        with pytest.raises(LogError, match="looked"):
            await made._keep_time(())

    asyncio.run(main())


# -- gaps


def state(first: int, last: int) -> StreamState:
    return StreamState(OWN, "created", first, last, last - first + 1, 0, None, 0.0)


@pytest.fixture
def stream_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """What the server says of the own stream."""

    def say(first: int, last: int) -> None:
        async def answer(*_: object) -> StreamState:
            return state(first, last)

        monkeypatch.setattr(replication, "stream_state", answer)

    return say


class Bridges:
    """Takes note of the gaps it is asked to bridge, and leaves the database at `position`."""

    def __init__(self, database: Database, position: int) -> None:
        self._database = database
        self._position = position
        self.gaps: list[Gap] = []

    async def __call__(self, gap: Gap) -> bool:
        self.gaps.append(gap)
        self._database.at = Position(OWN, "created", self._position)
        return gap.lost


def gap_session(database: Database, bridge: Bridges) -> Session:
    made = Session(
        *(cast(Any, database), cast(Any, Client()), SETTINGS, Mode(), Wakeup(), Progress()),
        tolerance_ms=60_000,
        bridge=bridge,
    )
    made._reached = {OWN: asyncio.Event()}
    return made


@pytest.mark.parametrize(
    ("found", "needed"),
    [
        (GapFound(OWN, 11, 50, "messages 11 to 49 were discarded"), 49),
        (GapFound(OWN, 11, 13, "message 13 came"), 12),
        (GapFound(OWN, 11, None, "messages up to 90 are missing"), 90),
        (GapFound(OWN, 11, None, "the stream ends at 5", lost=True), 0),
    ],
)
def test_what_a_gap_needs(stream_is: Callable[[int, int], None], found: GapFound, needed: int) -> None:
    async def main() -> None:
        stream_is(50, 90)
        database = Database()
        database.at = Position(OWN, "created", 10)
        bridge = Bridges(database, 60)
        made = gap_session(database, bridge)
        position = await made._bridge(found)
        assert position.sequence == 60
        assert bridge.gaps == [Gap(OWN, found.reason, found.lost, needed)]
        assert made._hesitates == found.lost
        assert made._progress.gap is None

    asyncio.run(main())


def test_without_snapshots_everything_is_published_again_and_the_hole_is_told(
    stream_is: Callable[[int, int], None],
) -> None:
    async def main() -> None:
        stream_is(50, 90)
        database = Database()
        database.at = Position(OWN, "created", 10)
        made = session(database)
        position = await made._bridge(GapFound(OWN, 11, 50, "messages 11 to 49 were discarded"))
        assert position.sequence == 49
        assert database.events[-2:] == ["hole noted up to 49", "started over at 49"], "known even if killed in between"
        assert database.incomplete is not None
        assert "11 to 49" in database.incomplete

    asyncio.run(main())


def test_what_waited_for_a_gap_is_read_again_once_it_is_bridged(
    stream_is: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else this node would take no snapshot, and ask to be upgraded, for as long as the connection holds."""

    async def due(_: object) -> bool:
        return True

    async def main() -> None:
        stream_is(50, 90)
        monkeypatch.setattr(replication, "is_due", due)
        database = Database()
        bridge = Bridges(database, 60)
        with pytest.raises(BeginAgain):
            await gap_session(database, bridge)._bridge(GapFound(OWN, 11, 50, "messages 11 to 49 were discarded"))
        assert len(bridge.gaps) == 1

    asyncio.run(main())


@pytest.mark.parametrize(("found", "goes_on"), [(13, 12), (None, 90)])
def test_without_snapshots_reading_goes_on_behind_a_hole_in_the_middle(
    stream_is: Callable[[int, int], None], found: int | None, goes_on: int
) -> None:
    """From the log's beginning it would come to the same hole again, and publish everything each time."""

    async def main() -> None:
        stream_is(1, 90)
        database = Database()
        database.at = Position(OWN, "created", 10)
        position = await session(database)._bridge(GapFound(OWN, 11, found, "messages are missing"))
        assert position.sequence == goes_on
        assert database.incomplete is not None

    asyncio.run(main())


@pytest.mark.parametrize(("first", "is_hole"), [(1, False), (0, False), (50, True)])
def test_without_snapshots_a_log_that_is_filled_again_from_its_first_message_leaves_no_hole(
    stream_is: Callable[[int, int], None], first: int, is_hole: bool
) -> None:
    async def main() -> None:
        stream_is(first, 90)
        database = Database()
        database.at = Position(OWN, "created", 100)
        await session(database)._bridge(GapFound(OWN, 101, None, "the stream ends at 90, before 100", lost=True))
        assert (database.incomplete is not None) == is_hole
        assert database.events[-1].startswith("started over")

    asyncio.run(main())


def test_synced_is_what_was_stored_before_the_streams_ends_were_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that came while they answered may not have been read."""

    async def main() -> None:
        made = session(Database())
        timekeeper = Timekeeper(60_000, synchronized=lambda: True)
        made._engine.time = timekeeper

        async def slow_streams(*_: object) -> tuple[StreamState, ...]:
            await asyncio.sleep(0.05)
            return (StreamState(OWN, "created", 1, 9, 9, 0, clock.wall_ms(), 0.0),)

        async def learn(states: Sequence[StreamState]) -> None:
            [state] = states
            assert state.server_ms is not None
            timekeeper.commit(timekeeper.propose(timekeeper.heard(state.server_ms, 0.0)))
            await asyncio.sleep(0.05)

        monkeypatch.setattr(replication, "ensure_streams", slow_streams)
        monkeypatch.setattr(made, "_learn_time", learn)
        monkeypatch.setattr(made, "_take_note", lambda _: None)
        before_ms = clock.wall_ms()
        await made._open_streams()
        assert made._connected_ms is not None
        assert before_ms - 10 <= made._connected_ms <= before_ms + 10

    asyncio.run(main())


@pytest.mark.parametrize("reads", [True, False])
def test_it_is_in_step_from_the_streams_ends_until_the_session_ends(
    monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    async def main() -> None:
        made = session(Database(), Mode(replicate=reads, publish=False))
        seen: list[bool] = []

        class Watched(Stream):
            async def read(self, **limits: Any) -> Delivery:
                seen.append(made._progress.in_step)
                return await super().read(**limits)

        state = StreamState(OWN, "created", 1, 2, 2, 0, None, 0.0)

        async def streams(*_: object) -> tuple[StreamState, ...]:
            return (state,)

        async def nothing(*_: object) -> None:
            seen.append(made._progress.in_step)

        async def keep_time(_: object) -> None:
            seen.append(made._progress.in_step)
            if not reads:
                raise LogError("the end")
            await asyncio.Event().wait()

        monkeypatch.setattr(made, "_open_streams", streams)
        monkeypatch.setattr(replication, "read_again", nothing)
        monkeypatch.setattr(made, "_keep_time", keep_time)
        monkeypatch.setattr(made, "_consumer", lambda *_: Watched([at(1), at(2), at(2)]))
        monkeypatch.setattr(made._publishing, "stop", nothing)
        with pytest.raises(LogError):
            await made.run()
        # With the end reached, the last two reads; after that `stop`.
        assert seen == ([False, False, False, False, True, True, False] if reads else [True, False])
        assert not made._progress.in_step

    asyncio.run(main())


def test_a_gap_while_publishing_ends_the_session_first(stream_is: Callable[[int, int], None]) -> None:
    """Nothing may be published from a state that is not complete."""

    async def main() -> None:
        stream_is(50, 90)
        database = Database()
        bridge = Bridges(database, 60)
        made = gap_session(database, bridge)
        made._reached[OWN].set()
        with pytest.raises(BeginAgain):
            await made._bridge(GapFound(OWN, 11, 50, "messages 11 to 49 were discarded"))
        assert bridge.gaps == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("others", "stored", "is_gap"), [([], 10, False), ([20], 10, True), ([], 8, True)], ids=["own", "one", "open group"]
)
def test_own_messages_that_were_discarded_unread_are_no_gap(
    stream_is: Callable[[int, int], None], others: list[int], stored: int, is_gap: bool
) -> None:
    """What was in them came from this database. Not if a message of somebody else was among them, nor while a group is
    open, which the position waits for."""

    async def main() -> None:
        stream_is(50, 90)
        database = Database()
        database.at = Position(OWN, "created", stored)
        bridge = Bridges(database, 60)
        made = gap_session(database, bridge)
        made._publisher._remember(7, [sequence for sequence in range(11, 50) if sequence not in others])
        position = await made._bridge(GapFound(OWN, 11, 50, "messages 11 to 49 were discarded"))
        assert bool(bridge.gaps) == is_gap
        assert position.sequence == (60 if is_gap else 49)
        assert database.events[-1:] == (["position"] if is_gap else ["moved 49"])

    asyncio.run(main())
