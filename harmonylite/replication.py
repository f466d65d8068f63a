"""One connection's replication: read every stream to its end, then publish, and go on with both until it is lost.

The order matters. Publishing before the end was reached would bring back what others have already beaten, or
deleted so long ago that the tombstone is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field

from nats.aio.client import Client

from harmonylite.db.database import PositionsLostError
from harmonylite.engine import Engine, Packed
from harmonylite.model import Position
from harmonylite.observe.log import Repeated
from harmonylite.stream.consumer import Consumer, GapFound
from harmonylite.stream.log import LogError, LogSettings, StreamState, ensure_streams, stream_state
from harmonylite.stream.publisher import Published, Publisher, PublishFailed
from harmonylite.tasks import run_together, wait_first

log = logging.getLogger(__name__)

# Groups that may wait for their acknowledgement at the same time, and their bytes.
WINDOW_GROUPS, WINDOW_BYTES = 64, 8 << 20

# Pause after a publication failed, or a stream could not be used.
RETRY_S = 1.0

# The server's clock is asked for that often.
CLOCK_INTERVAL_S = 60.0

# A commit becomes visible after the write that wakes us: a moment later, or as late as the card's fsync ends, of which
# nothing tells. So look again after these pauses.
LOOK_AGAIN_S = (0.0, 0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(slots=True)
class Progress:
    """What `status` shows. stream ends as seen last; publishing: the streams were read to
    their ends and pending rows go out; hole: messages that were missed, if any; error: why replication waits."""

    ends: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    catching_up: bool = False
    publishing: bool = False
    hole: str | None = None
    error: str | None = None


class Wakeup:
    """Tells the publisher that somebody committed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for a commit (True), or for the time to pass (False)."""
        # Not wait_for: until Python 3.12 it swallows a cancellation that comes just after a commit, and SIGTERM hangs.
        if not await wait_first(self._event, timeout_s=timeout_s):
            return False
        self._event.clear()  # not when cancelled: the next one to wait must see it
        return True


@dataclass(frozen=True, slots=True)
class Mode:
    """What this node does. polling_s: look for changes that often besides being woken; None: never."""

    publish: bool = True
    replicate: bool = True
    polling_s: float | None = None


class Session:
    """Replication over one connected client, until the connection is lost or `run` is cancelled."""

    def __init__(
        self,
        engine: Engine,
        client: Client,
        settings: LogSettings,
        mode: Mode,
        wakeup: Wakeup,
        progress: Progress,
        tolerance_ms: int,
    ) -> None:
        self._engine = engine
        self._client = client
        self._settings = settings
        self._mode = mode
        self._wakeup = wakeup
        self._progress = progress
        self._tolerance_ms = tolerance_ms
        self._publisher = Publisher(client, settings)
        self._reached: dict[str, asyncio.Event] = {}
        self._in_flight: deque[tuple[Packed, asyncio.Task[Published]]] = deque()
        # Acknowledged, but not read back: what a log has only acknowledged, it can still lose unseen by the gap test.
        self._unread: deque[tuple[int, Packed]] = deque()
        self._own_position = 0
        self._trouble = Repeated(log)

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
            self._progress.ends[state.name] = state.last_seq
            await self._learn_time(state)
        return states

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
        progress = self._progress
        while True:
            if consumer.checked and consumer.read_through >= end and not self._reached[stream].is_set():
                self._reached[stream].set()
                progress.catching_up = not all(event.is_set() for event in self._reached.values())
            # The first read makes the gap test, and does not wait for messages that may not come.
            delivery = await (consumer.read() if consumer.checked else consumer.read(wait_s=0))
            progress.ends[stream] = max(progress.ends.get(stream, 0), consumer.read_through)
            sequence = delivery.position.sequence
            if sequence != progress.positions.get(stream) or delivery.groups or delivery.undecodable:
                await self._engine.apply(delivery)
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

    async def _bridge(self, gap: GapFound) -> Position:
        """The log lost messages that this node needs, or became another one.

        What this node has is published again, whoever wrote it, at the versions it has: so nothing that is here can
        get lost in the cluster, and what others have comes from them the same way.
        """
        state = await stream_state(self._client, self._settings, gap.stream)
        position = Position(gap.stream, state.created, max(0, state.first_seq - 1))
        self._progress.hole = f"stream {gap.stream}: {gap.reason}"
        log.error(
            "the log does not continue where this node stopped; its rows are published again and reading starts at the"
            " log's beginning; changes that only the lost messages held may be missing here",
            extra={"fields": {"stream": gap.stream, "reason": gap.reason, "from": position.sequence + 1}},
        )
        if gap.stream == self._settings.own_stream:
            self._unread.clear()
            self._own_position = 0
        await self._engine.write(lambda: self._engine.replica.start_over(position))
        return position

    # -- publishing

    async def _publish(self) -> None:
        """Publish what is pending, for ever; first wait until all streams were read to their ends."""
        if self._mode.replicate:
            await asyncio.gather(*(event.wait() for event in self._reached.values()))
        log.info("caught up, publishing", extra={"fields": {"pending": await self._engine.pending()}})
        self._progress.publishing = True
        after = 0
        while True:
            try:
                after = await self._publish_all(after)
                await self._idle()
            except PublishFailed as failure:
                self._trouble.warning("publication failed; it is done again", {"error": str(failure)})
                await self._engine.release()
                await asyncio.sleep(RETRY_S)
                after = 0

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
        publication = self._publisher.publish(group.number, group.payload, group.newest_ms)
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
            except PublishFailed:
                # Those behind it may be stored or not: all of them are sent again.
                await asyncio.gather(*(each for _, each in self._in_flight), return_exceptions=True)
                self._in_flight.clear()
                raise
            self._in_flight.popleft()
            if self._mode.replicate:
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
        await self._wakeup.wait(self._mode.polling_s)

    # -- time

    async def _keep_time(self, states: tuple[StreamState, ...]) -> None:
        """Ask the server for its clock now and then, and for the streams' ends."""
        while True:
            await asyncio.sleep(CLOCK_INTERVAL_S)
            for known in states:
                try:
                    state = await stream_state(self._client, self._settings, known.name)
                except LogError as error:
                    self._trouble.warning("the stream cannot be asked", {"stream": known.name, "error": str(error)})
                    continue
                self._progress.ends[state.name] = state.last_seq
                await self._learn_time(state)

    async def _learn_time(self, state: StreamState) -> None:
        if state.server_ms is not None:
            await self._engine.server_time(state.server_ms, state.round_trip_ms)
