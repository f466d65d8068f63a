"""One connection's replication: read every stream to its end, then publish, and go on with both until it is lost.

The order matters. Publishing before the end was reached would bring back what others have already beaten, or
deleted so long ago that the tombstone is gone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from nats.aio.client import Client

from harmonylite.catchup import Gap
from harmonylite.db.database import PositionsLostError
from harmonylite.engine import Engine, Packed
from harmonylite.model import Position
from harmonylite.observe.log import Repeated
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.publish_trouble import PublishTrouble
from harmonylite.stream.consumer import Consumer, GapFound
from harmonylite.stream.log import LogError, LogSettings, StreamState, stream_state
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.publisher import GroupTooLarge, Published, Publisher, PublishFailed
from harmonylite.stream.pull import PULL_EXPIRES_S
from harmonylite.tasks import run_together

log = logging.getLogger(__name__)

# Groups that may wait for their acknowledgement at the same time, and their bytes.
WINDOW_GROUPS, WINDOW_BYTES = 64, 8 << 20

# Pause after a publication failed, or a stream could not be used.
RETRY_S = 1.0

# After the log lost messages everybody has much to publish, most of it the same: a random pause of up to this, in which
# a node reads what the first ones publish.
HESITATION_S = 5.0
FEW_ROWS = 200

# The server's clock is asked for that often.
CLOCK_INTERVAL_S = 60.0

# A commit becomes visible after the write that wakes us: a moment later, or as late as the card's fsync ends, of which
# nothing tells. So look again after these pauses.
LOOK_AGAIN_S = (0.0, 0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class BeginAgain(LogError):  # noqa: N818 - what to do
    """The log broke while this node was publishing: a new session bridges the gap before it publishes again."""


# Makes the database ready to be read on from; whether everybody now has much to publish (CatchUp.bridge).
Bridge = Callable[[Gap], Awaitable[bool]]


class Session:
    """Replication over one connected client, until the connection is lost or `run` is cancelled.

    bridge: what to do about gaps; None: rows are published again, and what was missed stays missing. on_caught_up:
    called when all streams were read to their ends.
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
        self._hesitates = False
        self._connected_ms: int | None = None
        self._publisher = Publisher(client, settings)
        self._reached: dict[str, asyncio.Event] = {}
        self._in_flight: deque[tuple[Packed, asyncio.Task[Published]]] = deque()
        # Acknowledged, but not read back: what a log has only acknowledged, it can still lose unseen by the gap test.
        self._unread: deque[tuple[int, Packed]] = deque()
        self._own_position = 0
        self._trouble = Repeated(log)
        self._publish_trouble = PublishTrouble(progress)
        self._begin_again = False

    async def run(self) -> None:
        """Returns when the connection is closed; raises LogError when the streams cannot be used."""
        states = await self._open_streams()
        self._reached = {state.name: asyncio.Event() for state in states}
        self._progress.catching_up = self._mode.replicate
        self._progress.error = None
        jobs = [self._keep_time(states)]
        if self._mode.replicate:
            jobs += [self._consume(state) for state in states]
        if self._mode.publish:
            jobs.append(self._publish())
        try:
            await run_together(*jobs)
        finally:
            self._publisher.connection_lost()
            for _, task in self._in_flight:
                task.cancel()
            await asyncio.gather(*(task for _, task in self._in_flight), return_exceptions=True)
            await self._publisher.close()
            await self._engine.release()

    async def _open_streams(self) -> tuple[StreamState, ...]:
        states = await ensure_streams(self._client, self._settings)
        for state in states:
            self._take_note(state)
            await self._learn_time(state)
        self._connected_ms = self._engine.time.server.now_ms()
        return states

    def _take_note(self, state: StreamState) -> None:
        """A stream as it is now: groups that were too large for it may fit since."""
        self._progress.ends[state.name] = state.last_seq
        if state.name != self._settings.own_stream:
            return
        # Half of it: bytes in memory are not those on the wire, and parts have headers.
        self._engine.replica.limit_groups((state.max_bytes or 0) // 2)
        if self._publisher.stream_seen(state):
            self.publish_again()

    def poll_every(self, polling_s: float | None) -> None:
        """Another value for `Mode.polling_s`."""
        self._mode = replace(self._mode, polling_s=polling_s)
        self._wakeup.set()

    def publish_again(self) -> None:
        """If a group was refused, send everything again that is pending: something may have changed for it."""
        if self._publish_trouble.holds_back:
            self._begin_again = True
            self._wakeup.set()

    # -- reading

    async def _consume(self, state: StreamState) -> None:
        """Read one stream and apply it, for ever."""
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
        )

    async def _follow(self, consumer: Consumer, stream: str, end: int) -> None:
        progress, pace = self._progress, self._engine.pace
        while True:
            if consumer.checked and consumer.read_through >= end and not self._reached[stream].is_set():
                self._reached[stream].set()
                progress.catching_up = not self._all_reached()
                if not progress.catching_up:
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
            if stream == self._settings.own_stream:
                # After the position was noted: then no position is stored that is older than the watermark.
                self._own_position = sequence
                self._mark_read()

    def _mark_read(self) -> None:
        """Groups that this node has seen in the stream are published, once and for all."""
        while self._unread and self._unread[0][0] <= self._own_position:
            self._engine.published(self._unread.popleft()[1])

    def _all_reached(self) -> bool:
        return all(event.is_set() for event in self._reached.values())

    def _note_synced(self, server_ms: int | None) -> None:
        """Everything that was in the streams at that time has taken effect here."""
        if server_ms is not None and self._progress.hole is None:
            self._engine.replica.note_synced(server_ms)

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
            self._unread.clear()
            self._own_position = 0
        if self._bridge_gap is None:
            position = Position(stream, state.created, max(0, state.first_seq - 1))
            self._progress.hole = f"stream {stream}: {found.reason}"
            log.error(
                "its rows are published again and reading starts at the log's beginning; changes that only the lost"
                " messages held may be missing here",
                extra={"fields": {"stream": stream, "from": position.sequence + 1}},
            )
            await self._engine.write(lambda: self._engine.replica.start_over(position))
            return position
        # Messages that are missing at the end of the stream have no first one after them.
        needed = 0 if found.lost else state.last_seq if found.found is None else found.found - 1
        self._hesitates |= await self._bridge_gap(Gap(stream, found.reason, found.lost, needed))
        self._progress.gap = None
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
        if self._hesitates and await self._engine.pending() > FEW_ROWS:
            await asyncio.sleep(random.uniform(0, HESITATION_S))
        log.info("caught up, publishing", extra={"fields": {"pending": await self._engine.pending()}})
        self._progress.publishing = True
        after = 0
        while True:
            try:
                after = await self._publish_all(after)
                if not self._begin_again:
                    await self._idle()
                if self._begin_again:
                    self._begin_again, after = False, 0
                    self._publish_trouble.begin_again()
            except PublishFailed:
                await self._engine.release()
                await asyncio.sleep(RETRY_S)
                after = 0
                self._publish_trouble.begin_again()

    async def _publish_all(self, after: int) -> int:
        """Publish until nothing is left. Returns the last batch that was handed to the stream."""
        looks = 0
        while looks < len(LOOK_AGAIN_S):
            packed = await self._engine.take_outgoing(after)
            if packed:
                looks = 0
                for group in packed:
                    await self._send(group)
                    after = max(after, group.through)
                continue
            await self._settle(wait=False)
            looks = 0 if await self._wakeup.wait(LOOK_AGAIN_S[looks]) else looks + 1
        return after

    async def _send(self, group: Packed) -> None:
        """Hand one group to the connection; waits while the window is full."""
        await self._settle(wait=False)
        while self._in_flight and (
            len(self._in_flight) >= WINDOW_GROUPS or self._bytes_in_flight() + len(group.payload) > WINDOW_BYTES
        ):
            await self._settle(wait=True)
        publication = self._publisher.publish(
            group.number, group.payload, group.newest_ms, on_late=partial(self._publish_trouble.late, group)
        )
        self._in_flight.append((group, asyncio.create_task(publication)))
        await asyncio.sleep(0)  # lets the publication reach the connection, in the order of the calls

    def _bytes_in_flight(self) -> int:
        return sum(len(group.payload) for group, _ in self._in_flight)

    async def _settle(self, *, wait: bool) -> None:
        """Take note of acknowledgements, in order; `wait`: for at least the first. Raises PublishFailed."""
        while self._in_flight and (wait or self._in_flight[0][1].done()):
            group, task = self._in_flight[0]
            try:
                published = await task
            except GroupTooLarge as refusal:
                self._in_flight.popleft()
                self._publish_trouble.refused(group, refusal)
                wait = False
                continue
            except PublishFailed as failure:
                self._publish_trouble.failed(group, failure)
                # Those behind it may be stored or not: all of them are sent again.
                await asyncio.gather(*(each for _, each in self._in_flight), return_exceptions=True)
                self._in_flight.clear()
                raise
            self._in_flight.popleft()
            self._publish_trouble.acknowledged(group)
            if self._publish_trouble.holds_back:
                pass  # sent again together with the group before it that was refused
            elif self._mode.replicate:
                self._unread.append((max(published.sequences), group))
                self._mark_read()
            else:
                self._engine.published(group)
            wait = False

    async def _idle(self) -> None:
        """Wait for the next commit; meanwhile take note of acknowledgements as they come."""
        while self._in_flight:
            first = self._in_flight[0][1]
            woken = asyncio.ensure_future(self._wakeup.wait(None))
            try:
                await asyncio.wait([first, woken], return_when=asyncio.FIRST_COMPLETED)
                if woken.done():
                    return
            finally:
                woken.cancel()
                await asyncio.gather(woken, return_exceptions=True)
            await self._settle(wait=False)
        self._publish_trouble.all_done()
        await self._wakeup.wait(self._mode.polling_s)

    # -- time

    async def _keep_time(self, states: tuple[StreamState, ...]) -> None:
        """Ask the server for its clock now and then, and for the streams' ends."""
        while True:
            await asyncio.sleep(CLOCK_INTERVAL_S)
            asked_ms = self._engine.time.server.now_ms()
            for known in states:
                try:
                    state = await stream_state(self._client, self._settings, known.name)
                except LogError as error:
                    self._trouble.warning("the stream cannot be asked", {"stream": known.name, "error": str(error)})
                    continue
                self._take_note(state)
                await self._learn_time(state)
            ends, positions = self._progress.ends, self._progress.positions
            if self._all_reached() and all(positions.get(name, 0) >= end for name, end in ends.items()):
                self._note_synced(asked_ms)

    async def _learn_time(self, state: StreamState) -> None:
        if state.server_ms is not None:
            await self._engine.server_time(state.server_ms, state.round_trip_ms)
