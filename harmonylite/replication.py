"""One connection's replication: read every stream to its end, then publish, and go on with both until it is lost.

The order matters. Publishing before the end was reached would bring back what others have already beaten, or
deleted so long ago that the tombstone is gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from nats.aio.client import Client

from harmonylite.catchup import Gap
from harmonylite.db.database import PositionsLostError
from harmonylite.engine import Engine
from harmonylite.model import Position
from harmonylite.observe.log import Repeated
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.publishing import Publishing
from harmonylite.rereading import is_due, read_again
from harmonylite.stream.consumer import Consumer, GapFound
from harmonylite.stream.lineage import note_emptied
from harmonylite.stream.log import LogError, LogSettings, StreamState, ask_time, stream_state
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.publisher import Publisher
from harmonylite.stream.pull import PULL_EXPIRES_S
from harmonylite.tasks import run_together

log = logging.getLogger(__name__)

# After the log lost messages everybody has much to publish, most of it the same: a random pause of up to this, in which
# a node reads what the first ones publish.
HESITATION_S = 5.0
FEW_ROWS = 200

# The server's clock is asked for that often.
CLOCK_INTERVAL_S = 60.0


class BeginAgain(LogError):  # noqa: N818 - what to do
    """The log broke while this node was publishing: a new session bridges the gap before it publishes again."""


# Makes the database ready to be read on from; whether everybody now has much to publish (CatchUp.bridge).
Bridge = Callable[[Gap], Awaitable[bool]]


async def _at_once() -> None:
    """Nothing is in the way."""


class Session:
    """Replication over one connected client, until the connection is lost or `run` is cancelled.

    bridge: what to do about gaps; None: rows are published again, and what was missed stays missing. on_caught_up:
    called when all streams were read to their ends. may_read: returns when reading may begin.
    """

    def __init__(
        self,
        engine: Engine,
        client: Client,
        settings: LogSettings,
        mode: Mode,
        wakeup: Wakeup,
        progress: Progress,
        tolerance_ms: int,
        bridge: Bridge | None = None,
        on_caught_up: Callable[[], None] = lambda: None,
        may_read: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        self._engine = engine
        self._client = client
        self._settings = settings
        self._mode = mode
        self._wakeup = wakeup
        self._progress = progress
        self._tolerance_ms = tolerance_ms
        self._bridge_gap = bridge
        self._on_caught_up = on_caught_up
        self._may_read = may_read
        self._hesitates = False
        self._connected_ms: int | None = None
        self._may_ask_time = True
        self._publisher = Publisher(client, settings)
        self._publishing = Publishing(engine, self._publisher, mode, wakeup, progress)
        self._reached: dict[str, asyncio.Event] = {}
        self._trouble = Repeated(log)

    async def run(self) -> None:
        """Returns when the connection is closed; raises LogError when the streams cannot be used."""
        states = await self._open_streams()
        if self._mode.replicate:
            # Before anything is published: what they say may have been beaten, or deleted, since.
            await read_again(self._engine, self._client, self._settings)
        self._reached = {state.name: asyncio.Event() for state in states}
        self._progress.catching_up = self._mode.replicate
        self._progress.in_step = not self._mode.replicate
        self._progress.error = None
        jobs = [self._keep_time(states)]
        if self._mode.replicate:
            jobs += [self._consume(state) for state in states]
        if self._mode.publish:
            jobs.append(self._publish())
        try:
            await run_together(*jobs)
        finally:
            self._progress.in_step = False
            await self._publishing.stop()

    async def _open_streams(self) -> tuple[StreamState, ...]:
        asked = time.monotonic()
        states = await ensure_streams(self._client, self._settings)
        for state in states:
            self._take_note(state)
        await self._learn_time(states)
        if (now_ms := self._engine.time.server.now_ms()) is not None:
            # When the streams' ends were asked: what was stored later may not have been read yet.
            self._connected_ms = now_ms - math.ceil((time.monotonic() - asked) * 1000)
        return states

    def _take_note(self, state: StreamState) -> None:
        """A stream as it is now: groups that were too large for it may fit since."""
        self._progress.ends[state.name] = state.last_seq
        if state.name != self._settings.own_stream:
            return
        # Half of it: bytes in memory are not those on the wire, and parts have headers.
        self._engine.replica.outgoing.limit_groups((state.max_bytes or 0) // 2)
        self._publishing.stream_seen(state)

    def poll_every(self, polling_s: float | None) -> None:
        """Another value for `Mode.polling_s`."""
        self._mode = self._publishing.mode = replace(self._mode, polling_s=polling_s)
        self._wakeup.set()

    def publish_again(self) -> None:
        """Groups that were too large for the stream are tried again: something may have changed for them."""
        self._publishing.again()

    # -- reading

    async def _consume(self, state: StreamState) -> None:
        """Read one stream and apply it, for ever."""
        await self._may_read()
        position = await self._engine.position(state.name) or Position(state.name, "", 0)
        while True:
            consumer = self._consumer(state.name, position)
            try:
                await self._follow(consumer, state.name, state.last_seq)
            except GapFound as gap:
                position = await self._bridge(gap)
                state = await stream_state(self._client, self._settings, state.name)
            except PositionsLostError as lost:
                log.warning(
                    "what was read of the stream is read again",
                    extra={"fields": {"stream": state.name, "reason": str(lost)}},
                )
                position = await self._engine.position(state.name) or Position(state.name, "", 0)
            finally:
                if self._client.is_connected:
                    await consumer.close()

    def _consumer(self, stream: str, position: Position) -> Consumer:
        return Consumer(
            self._client,
            self._settings,
            stream,
            position,
            is_own=self._publisher.is_own,
            tolerance_ms=self._tolerance_ms,
            emptied=self._progress.emptied,
        )

    async def _follow(self, consumer: Consumer, stream: str, end: int) -> None:
        progress, pace = self._progress, self._engine.pace
        while True:
            if consumer.checked and consumer.read_through >= end and not self._reached[stream].is_set():
                self._reached[stream].set()
                progress.catching_up = not self._all_reached()
                if not progress.catching_up:
                    progress.in_step = True
                    self._note_synced(self._connected_ms)
                    self._on_caught_up()
            # The first read makes the gap test, and does not wait for messages that may not come.
            wait_s = PULL_EXPIRES_S if consumer.checked else 0
            delivery = await consumer.read(max_messages=pace.messages, max_bytes=pace.bytes, wait_s=wait_s)
            progress.ends[stream] = max(progress.ends.get(stream, 0), consumer.read_through)
            sequence = delivery.position.sequence
            if sequence != progress.positions.get(stream) or delivery.groups or delivery.undecodable:
                await self._engine.apply(delivery)
                pace.held(*consumer.taken, self._engine.apply_held_s)
                progress.positions[stream] = sequence
                self._engine.metrics.stream_position.labels(stream).set(sequence)
                if (empty := progress.emptied.get(stream)) is not None and empty.sequence < sequence:
                    # Durable at once: killed before, this node would not know any more that the log was the same; and
                    # if it is the only one that has read on, nobody could take a snapshot.
                    del progress.emptied[stream]
                    await self._engine.position(stream)
            if stream == self._settings.own_stream:
                await self._publishing.read_back(sequence)

    def _all_reached(self) -> bool:
        return all(event.is_set() for event in self._reached.values())

    def _note_synced(self, server_ms: int | None) -> None:
        """Everything that was in the streams at that time has taken effect here."""
        if server_ms is not None and self._engine.replica.completeness.incomplete is None:
            self._engine.replica.completeness.note_synced(server_ms)

    async def _bridge(self, found: GapFound) -> Position:
        """The log does not go on. Returns the position to read on from; raises BeginAgain if that has to wait until
        nothing is published any more."""
        stream = found.stream
        state = await stream_state(self._client, self._settings, stream)
        position = await self._engine.position(stream)
        if position is not None and self._only_own_missing(found, position):
            log.info("only own messages were discarded unread", extra={"fields": {"stream": stream}})
            position = Position(stream, state.created, (found.found or 1) - 1)
            await self._engine.move_position(position)
            return position
        if self._reached[stream].is_set():
            raise BeginAgain(str(found))
        self._note_gap(found)
        if stream == self._settings.own_stream:
            self._publishing.log_broke()
        # Messages that are missing at the end of the stream have no first one after them.
        needed = 0 if found.lost else state.last_seq if found.found is None else found.found - 1
        if self._bridge_gap is None:
            position = Position(stream, state.created, max(0, state.first_seq - 1, needed))
            log.error(
                "its rows are published again and reading goes on behind what is missing; changes that only the lost"
                " messages held may be missing here",
                extra={"fields": {"stream": stream, "from": position.sequence + 1}},
            )
            if not (found.lost and state.first_seq <= 1):
                # A log that begins with its first message is filled by all nodes: what it lost comes again.
                hole = f"stream {stream}: {found.reason}"
                await self._engine.write(lambda: self._engine.replica.completeness.note_hole(hole, position))
            await self._engine.start_over(position)
            return position
        self._hesitates |= await self._bridge_gap(Gap(stream, found.reason, found.lost, needed))
        self._progress.gap = None
        if await is_due(self._engine):
            raise BeginAgain("messages that had to wait for a gap can be read again")
        return await self._engine.position(stream) or Position(stream, "", 0)

    def _only_own_missing(self, gap: GapFound, position: Position) -> bool:
        """Whether this process published, and had acknowledged, all that was missed: nothing in it is new here."""
        return (
            gap.found is not None
            and not gap.lost
            and gap.stream == self._settings.own_stream
            and position.sequence == gap.expected - 1
            and self._publisher.sent_all(gap.expected, gap.found - 1)
        )

    def _note_gap(self, gap: GapFound) -> None:
        text = f"stream {gap.stream}: {gap.reason}"
        if text != self._progress.gap:
            self._progress.gap = text
            log.error(
                "the log does not continue where this node stopped",
                extra={"fields": {"stream": gap.stream, "reason": gap.reason, "lost": gap.lost}},
            )

    # -- publishing

    async def _publish(self) -> None:
        """Publish what is pending, for ever; first wait until all streams were read to their ends."""
        if self._mode.replicate:
            await asyncio.gather(*(event.wait() for event in self._reached.values()))
        if self._hesitates and await self._engine.pending(held=False) > FEW_ROWS:
            await asyncio.sleep(random.uniform(0, HESITATION_S))
        log.info("caught up, publishing", extra={"fields": {"pending": await self._engine.pending()}})
        self._progress.publishing = True
        await self._publishing.run()

    # -- time

    async def _keep_time(self, states: tuple[StreamState, ...]) -> None:
        """Ask the server for its clock now and then, and for the streams' ends."""
        while True:
            await asyncio.sleep(CLOCK_INTERVAL_S)
            asked_ms = self._engine.time.server.now_ms()
            found: list[StreamState] = []
            for known in states:
                try:
                    state = await stream_state(self._client, self._settings, known.name)
                except LogError as error:
                    self._trouble.warning("the stream cannot be asked", {"stream": known.name, "error": str(error)})
                    continue
                self._take_note(state)
                if (position := await self._engine.position(state.name)) is not None:
                    note_emptied(self._progress.emptied, state, position)
                found.append(state)
            try:
                await self._learn_time(found)
            except LogError as error:
                self._trouble.warning("the server's time cannot be asked", {"error": str(error)})
            await self._publishing.look_at_held()
            ends, positions = self._progress.ends, self._progress.positions
            if self._all_reached() and all(positions.get(name, 0) >= end for name, end in ends.items()):
                self._note_synced(asked_ms)

    async def _learn_time(self, states: Sequence[StreamState]) -> None:
        """From what the server said with the streams; one before 2.10 is asked.

        Raises LogError if a node that reads the log cannot: nothing is published by a clock that may be wrong.
        """
        times = [told for state in states if (told := state.server_time) is not None]
        if states and not times and self._may_ask_time:
            try:
                times = [await ask_time(self._client, self._settings)]
            except LogError as error:
                if self._mode.replicate:
                    raise
                # Who only publishes need not be allowed to make a consumer.
                self._may_ask_time = False
                if self._engine.time.server.now_ms() is None:
                    self._engine.time.untold(str(error))
        for told in times:
            await self._engine.correcting.server_time(told.now_ms(), told.round_trip_ms)
