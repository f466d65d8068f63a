"""What becomes of groups that a stream takes, refuses or does not answer for: a scripted stream and database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import apsw
import pytest

from harmonylite import publishing
from harmonylite.db.held import HELD
from harmonylite.observe.metrics import Metrics
from harmonylite.packing import Packed
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.publishing import Publishing
from harmonylite.stream.log import ApiError, StreamState
from harmonylite.stream.publisher import GroupTooLarge, Published, PublishFailed

OWN = "changes-1"


class Database:
    """Batches and how many bytes each takes; `joined` ones are one group. It takes note of what it is told."""

    def __init__(self, sizes: Mapping[int, int], joined: Sequence[int] = ()) -> None:
        self.metrics = Metrics("h", "l")
        self.replica = self.outgoing = self
        self.pending = dict(sizes)
        self.joined = tuple(joined)
        self.watermark = 0
        self.events: list[str] = []
        # A transaction over this many bytes is cut; 0: none.
        self.max_bytes = 0

    async def held(self) -> dict[int, int]:
        return {batch: size for batch, size in self.pending.items() if batch > HELD}  # a row is a byte

    def waiting(self) -> list[int]:
        return sorted(batch for batch in self.pending if self.watermark < batch < HELD)

    async def take_outgoing(self, after: int) -> list[Packed]:
        if after >= HELD:
            return self._groups([batch for batch in sorted(self.pending) if batch > after], apart=True)
        return self._groups([batch for batch in self.waiting() if batch > after], apart=not self.joined)

    def _groups(self, batches: list[int], *, apart: bool) -> list[Packed]:
        groups: list[Packed] = []
        together = [batch for batch in batches if not apart and batch in self.joined]
        for batch in batches:
            if batch not in together:
                groups += self._packed(batch, batch)
            elif batch == together[-1]:
                groups += self._packed(together[0], batch)
        return groups

    def _packed(self, lo: int, hi: int) -> list[Packed]:
        size = sum(bytes_ for batch, bytes_ in self.pending.items() if lo <= batch <= hi)
        step = self.max_bytes or size
        parts = [min(step, size - start) for start in range(0, size, step)]
        return [
            Packed(hi, b"x" * part, 1, 0, hi if last else lo - 1, not last, lo=lo, hi=hi, tables=("item",))
            for part, last in zip(parts, [False] * (len(parts) - 1) + [True], strict=True)
        ]

    async def write(self, job: Callable[[], object]) -> object:
        return job()

    def hold(self, batch: int) -> int:
        if batch in self.pending and batch < HELD:
            self.events.append(f"held {batch}")
            self.pending[HELD + batch] = self.pending.pop(batch)
        return self.pending[batch if batch > HELD else HELD + batch]

    def keep_apart(self, lo: int, hi: int) -> None:
        self.events.append(f"apart {lo} {hi}")
        self.joined = ()

    def keep_together(self) -> None:
        self.events.append("together")

    async def published(self, packed: Packed) -> None:
        if packed.is_held:
            if packed.through == packed.hi:
                self.events.append(f"released {packed.hi - HELD}")
                self.pending.pop(packed.hi)
        else:
            self.events.append(f"published {packed.through}")
            self.watermark = max(self.watermark, packed.through)

    async def release(self) -> None:
        pass


class Stream:
    """Holds `limit` bytes; `failures`: so many publications fail before one works; answers: whether it does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sent: list[tuple[int, int]] = []
        self.failures = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self._seen: StreamState | None = None

    async def publish(self, number: int, payload: bytes, max_ts: int, **_: Any) -> Published:
        if len(payload) > self.limit:
            raise GroupTooLarge(number, OWN, len(payload), self.limit)
        if self.failures:
            self.failures -= 1
            raise PublishFailed("it was not acknowledged")
        self.sent.append((number, len(payload)))
        sequence = len(self.sent)
        await self.answers.wait()
        return Published(OWN, (sequence,), len(payload))

    def stream_seen(self, state: StreamState) -> bool:
        known, self._seen = self._seen, state
        self.limit = state.max_bytes or self.limit
        return known is not None and known.max_bytes != state.max_bytes

    def connection_lost(self) -> None:
        pass

    async def close(self) -> None:
        pass


def state(limit: int) -> StreamState:
    return StreamState(OWN, "created", 1, 9, 9, 0, None, 0.0, max_bytes=limit)


class Connection:
    """One connection's publishing, in a node that does not read."""

    def __init__(self, database: Database, limit: int = 100, progress: Progress | None = None) -> None:
        self.database = database
        self.stream = Stream(limit)
        self.progress = progress or Progress()
        self.wakeup = Wakeup()
        engine, publisher = cast(Any, database), cast(Any, self.stream)
        self.publishing = Publishing(engine, publisher, Mode(replicate=False), self.wakeup, self.progress)
        self.publishing.stream_seen(state(limit))

    async def __aenter__(self) -> Connection:
        self.task = asyncio.create_task(self.publishing.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.publishing.stop()

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert not self.task.done(), self.task.exception()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)

    async def idle(self) -> None:
        """Until everything that it will send was sent."""
        await self.until(lambda: not self.database.waiting() and not self.publishing._in_flight)
        sent = -1
        while sent != len(self.stream.sent):
            sent = len(self.stream.sent)
            await asyncio.sleep(sum(publishing.LOOK_AGAIN_S) + 0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "LOOK_AGAIN_S", (0.0, 0.001))
    monkeypatch.setattr(publishing, "RETRY_S", 0.001)


def test_a_group_that_the_stream_cannot_hold_stays_and_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        database = Database({1: 10, 2: 500, 3: 10})
        async with Connection(database) as it:
            await it.idle()
            assert database.events == ["published 1", "held 2", "published 3"]
            assert database.watermark == 3
            (text,) = it.progress.refused.values()
            assert text == f"1 rows of item are not published: together they take 500 bytes, stream {OWN} holds 100"
        # Neither the next connection nor the next process sends again what was behind it.
        for progress in (it.progress, Progress()):
            async with Connection(database, progress=progress) as again:
                await again.idle()
                assert again.stream.sent == []
                assert list(again.progress.refused.values()) == [text]

    asyncio.run(main())
    errors = [cast(Any, record).fields for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2  # once in each process
    assert (errors[0]["tables"], errors[0]["rows"], errors[0]["bytes"], errors[0]["stream_max_bytes"]) == (
        ["item"],
        1,
        500,
        100,
    )
    assert "max_store" in errors[0]["to_do"]


def test_a_group_known_to_be_too_large_is_not_read_again_at_each_connection() -> None:
    async def main() -> None:
        database = Database({1: 500})
        async with Connection(database) as first:
            await first.idle()
        read: list[int] = []
        taken = database.take_outgoing

        async def take(after: int) -> list[Packed]:
            read.append(after)
            return await taken(after)

        cast(Any, database).take_outgoing = take
        async with Connection(database, progress=first.progress) as second:
            await second.idle()
        assert HELD not in read
        async with Connection(database, 1_000, progress=first.progress) as third:
            await third.until(lambda: not database.pending)
        assert HELD in read
        assert (first.progress.refused, first.progress.too_large) == ({}, {})

    asyncio.run(main())


def test_transactions_that_do_not_fit_together_are_cut_between(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        database = Database({1: 500, **dict.fromkeys(range(2, 101), 10), 101: 10}, joined=range(1, 101))
        async with Connection(database) as it:
            await it.idle()
        assert database.events[:2] == ["apart 1 100", "held 1"]
        assert database.watermark == 101
        assert [number for number, _ in it.stream.sent][-100:] == [*range(2, 102)]
        assert [batch for batch in database.pending if batch > HELD] == [HELD + 1]
        assert database.metrics.oversized_transactions.value == 1

    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


@pytest.mark.parametrize("reloaded", [False, True])
def test_what_was_refused_is_tried_again_when_something_changed(reloaded: bool) -> None:
    async def main() -> None:
        database = Database({1: 500, 2: 10})
        async with Connection(database) as it:
            await it.idle()
            it.publishing.stream_seen(state(100))
            await it.idle()
            assert [number for number, _ in it.stream.sent] == [2]
            if reloaded:
                database.max_bytes = 90
                it.publishing.again()
            else:
                it.publishing.stream_seen(state(1_000))
            await it.until(lambda: "released 1" in database.events)
            assert it.progress.refused == {}
        # What was behind it was not sent again.
        assert [number for number, _ in it.stream.sent].count(2) == 1
        assert sum(size for _, size in it.stream.sent) == 510

    asyncio.run(main())


def test_a_batch_of_which_one_part_is_refused_is_not_released() -> None:
    """Cut by a max_transaction_bytes that is over the stream's limit: only its last, small part fits."""

    async def main() -> None:
        database = Database({1: 500, 2: 10})
        database.max_bytes = 200
        async with Connection(database, 150) as it:
            await it.idle()
            assert database.events == ["held 1", "published 1", "published 2"]
            it.publishing.again()
            await it.until(lambda: len(it.stream.sent) == 3)
            await it.idle()
            assert [batch for batch in database.pending if batch > HELD] == [HELD + 1]
            assert not any(event.startswith("released") for event in database.events)

    asyncio.run(main())


def test_the_last_part_of_an_earlier_try_does_not_release_a_batch() -> None:
    async def main() -> None:
        database = Database({HELD + 1: 500})
        database.max_bytes = 200
        async with Connection(database, 150) as it:
            it.stream.answers.clear()
            await it.until(lambda: bool(it.progress.refused) and len(it.stream.sent) == 1)
            it.publishing.again()
            await asyncio.sleep(0.05)  # it would have begun again, if it did not wait
            it.stream.answers.set()
            await it.until(lambda: len(it.stream.sent) == 2)
            await it.idle()
            assert list(database.pending) == [HELD + 1]

    asyncio.run(main())


def test_a_batch_that_its_rows_have_left_is_tried_again() -> None:
    async def main() -> None:
        database = Database({1: 500})
        async with Connection(database) as it:
            await it.idle()
            for size, tried in ((500, 0), (101, 0), (100, 1)):
                database.pending[HELD + 1] = size
                await it.publishing.look_at_held()
                await it.idle()
                assert len(it.stream.sent) == tried
            assert database.events == ["held 1", "together", "released 1"]

    asyncio.run(main())


def test_a_failure_while_held_batches_are_tried_loses_none_of_them() -> None:
    async def main() -> None:
        database = Database({HELD + 1: 10, HELD + 2: 500, HELD + 3: 20, 4: 10})
        it = Connection(database)
        it.stream.failures = 3
        async with it:
            await it.until(lambda: {"released 1", "released 3", "published 4"} <= set(database.events))
            await it.idle()
        assert sorted(batch for batch in database.pending if batch > HELD) == [HELD + 2]
        assert list(it.progress.refused) == [HELD + 2]

    asyncio.run(main())


def test_a_held_batch_is_released_once_it_was_read_back() -> None:
    async def main() -> None:
        database = Database({HELD + 1: 10})
        it = Connection(database)
        it.publishing.mode = replace(it.publishing.mode, replicate=True)
        async with it:
            await it.until(lambda: bool(it.publishing._unread))
            assert database.events == []
            await it.publishing.read_back(1)
            assert database.events == ["released 1"]

    asyncio.run(main())


async def outcome(made: Publishing, through: int, result: Published | PublishFailed) -> None:
    async def publication() -> Published:
        if isinstance(result, PublishFailed):
            raise result
        return result

    group = Packed(through, b"x" * 10, 1, 0, through, False, lo=through, hi=through, tables=("item",))
    made._in_flight.append((group, asyncio.create_task(publication())))
    await made._settle(wait=True)


def test_the_status_says_that_publishing_is_refused_until_that_very_group_is_stored() -> None:
    async def main() -> None:
        it = Connection(Database({}))
        made, progress = it.publishing, it.progress
        refusal = PublishFailed("group 2 was not acknowledged: insufficient storage")
        refusal.__cause__ = ApiError("a message", 503, 10023, "insufficient storage")
        with pytest.raises(PublishFailed):
            await outcome(made, 2, refusal)
        said = "publishing is refused: group 2 was not acknowledged: insufficient storage"
        assert progress.error == said
        await outcome(made, 1, Published(OWN, (1,), 10))
        assert progress.error == said
        await outcome(made, 2, Published(OWN, (2,), 10))
        assert progress.error is None
        made._trouble.late(Packed(3, b"x" * 10, 1, 0, 3, False, lo=3, hi=3), 10)
        assert "not acknowledged for 10 s" in (progress.error or "")
        await outcome(made, 3, Published(OWN, (3,), 10))
        assert progress.error is None

    asyncio.run(main())


def test_what_is_held_is_tried_again_although_the_application_never_rests() -> None:
    async def main() -> None:
        database = Database({1: 500})
        async with Connection(database) as it:
            await it.idle()

            async def write() -> None:
                batch = 2
                while True:
                    database.pending[batch] = 1
                    batch += 1
                    it.wakeup.set()
                    await asyncio.sleep(0)

            writing = asyncio.create_task(write())
            try:
                await it.until(lambda: database.watermark > 10)
                it.publishing.stream_seen(state(1_000))
                await it.until(lambda: "released 1" in database.events)
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("grown", [False, True])
def test_a_held_batch_that_got_another_number_is_tried_again(grown: bool) -> None:
    """After a correction of the clock."""

    async def main() -> None:
        database = Database({1: 500})
        async with Connection(database) as it:
            await it.idle()
            database.pending[HELD + 2] = database.pending.pop(HELD + 1)
            await it.publishing.look_at_held()
            await it.idle()
            assert list(it.progress.too_large) == [HELD + 2]
            assert list(it.progress.refused) == [HELD + 2]
            database.pending[HELD + 3] = database.pending.pop(HELD + 2)
            if grown:
                it.publishing.stream_seen(state(1_000))
            else:
                database.pending[HELD + 3] = 50
                await it.publishing.look_at_held()
            await it.until(lambda: "released 3" in database.events)

    asyncio.run(main())


def test_a_database_that_does_not_answer_ends_no_connection() -> None:
    async def main() -> None:
        database = Database({1: 500})
        async with Connection(database) as it:
            await it.idle()

            async def busy() -> dict[int, int]:
                raise apsw.BusyError("database is locked")

            cast(Any, database).held = busy
            await it.publishing.look_at_held()
            assert list(it.progress.too_large) == [HELD + 1]

    asyncio.run(main())


def test_a_held_batch_on_its_way_is_not_sent_twice() -> None:
    async def main() -> None:
        database = Database({HELD + 1: 10})
        async with Connection(database) as it:
            it.stream.answers.clear()
            await it.until(lambda: len(it.stream.sent) == 1)
            await it.publishing.look_at_held()
            it.stream.answers.set()
            await it.until(lambda: "released 1" in database.events)
            await it.idle()
            assert len(it.stream.sent) == 1

    asyncio.run(main())


def test_a_held_group_that_is_stored_says_nothing_of_another_that_is_not() -> None:
    async def main() -> None:
        it = Connection(Database({HELD + 1: 10}))
        made, progress = it.publishing, it.progress
        refusal = PublishFailed("group 2 was not acknowledged: insufficient storage")
        refusal.__cause__ = ApiError("a message", 503, 10023, "insufficient storage")
        with pytest.raises(PublishFailed):
            await outcome(made, 2, refusal)
        await outcome(made, HELD + 1, Published(OWN, (1,), 10))
        assert progress.error is not None
        await outcome(made, 2, Published(OWN, (2,), 10))
        assert progress.error is None
        # A held one comes before all others: what is stored after it tells that it was, or is gone.
        with pytest.raises(PublishFailed):
            await outcome(made, HELD + 2, refusal)
        await outcome(made, 3, Published(OWN, (3,), 10))
        assert progress.error is None

    asyncio.run(main())


def test_with_a_polling_interval_changes_are_found_that_nothing_woke_for() -> None:
    """On a file system without inotify there are no wake-ups."""

    async def main() -> None:
        database = Database({1: 10})
        async with Connection(database) as it:
            it.publishing.mode = Mode(replicate=False, polling_s=0.05)
            await it.idle()
            database.pending[2] = 10
            await it.until(lambda: database.watermark == 2)

    asyncio.run(main())
