"""One connection's groups: sent in order, several at the same time, settled in order.

A group counts as published once the stream has it and this node has read it back in its place: what a log has only
acknowledged, it can still lose unseen by the gap test.

A group that is larger than the stream holds up nothing. One of several transactions, joined because the later ones
wrote the same rows, is cut between them; what is too large by itself is held (db/held.py): it waits, counted as
pending, until it fits, and whatever lies behind it is published once and for all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

import apsw

from harmonylite.db.held import HELD
from harmonylite.engine import Engine
from harmonylite.packing import Packed
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.publish_trouble import PublishTrouble
from harmonylite.stream.log import StreamState
from harmonylite.stream.publisher import GroupTooLarge, Published, Publisher, PublishFailed

# Groups that may wait for their acknowledgement at the same time, and their bytes.
WINDOW_GROUPS, WINDOW_BYTES = 64, 8 << 20

# Pause after a publication failed.
RETRY_S = 1.0

# A commit becomes visible after the write that wakes us: a moment later, or as late as the card's fsync ends, of which
# nothing tells. So look again after these pauses.
LOOK_AGAIN_S = (0.0, 0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class _SpanCut(Exception):  # noqa: N818 - what happened
    """A group was too large and is sent in smaller ones: everything of batches after `after` is read again."""

    def __init__(self, after: int) -> None:
        self.after = after


class Publishing:
    """Publishes what is pending over one connection; `run` may be cancelled, then `stop` has to follow.

    mode may be replaced while it runs.
    """

    def __init__(self, engine: Engine, publisher: Publisher, mode: Mode, wakeup: Wakeup, progress: Progress) -> None:
        self.mode = mode
        self._engine = engine
        self._publisher = publisher
        self._wakeup = wakeup
        self._progress = progress
        self._trouble = PublishTrouble(progress)
        self._in_flight: deque[tuple[Packed, asyncio.Task[Published]]] = deque()
        # Acknowledged, but not read back.
        self._unread: deque[tuple[int, Packed]] = deque()
        self._own_position = 0
        self._again = False
        self._stream_bytes: int | None = None
        # Whether held batches are to be tried; up to which they were handed over, and settled, since they last were.
        self._held_due = False
        self._held_sent = self._held_settled = HELD

    def stream_seen(self, state: StreamState) -> None:
        """The own stream as it is now."""
        self._stream_bytes = state.max_bytes
        if self._publisher.stream_seen(state):
            self.again()

    def again(self) -> None:
        """Something may have changed for groups that were refused: they are tried again."""
        self._trouble.forget_sizes()
        self._again = True
        self._wakeup.set()

    async def look_at_held(self) -> None:
        """Now and then: rows that are written again leave a held batch, and it may fit then; a correction of the clock
        makes another batch of it."""
        try:
            held = await self._engine.held()
        except apsw.Error:
            return  # `report` asks the same, and tells
        under_way = {group.hi for group, _ in self._in_flight} | {group.hi for _, group in self._unread}
        waiting = {batch: number for batch, number in held.items() if batch not in under_way}
        if self._trouble.may_fit(waiting, self._stream_bytes):
            self.again()

    async def read_back(self, sequence: int) -> None:
        """This node has read its own stream up to there; the position was noted, so that no position is ever stored
        that is older than the watermark."""
        self._own_position = sequence
        await self._mark_read()

    def log_broke(self) -> None:
        """The own stream does not go on: what was acknowledged and not read back may be lost, and stays pending."""
        self._unread.clear()
        self._own_position = 0

    async def stop(self) -> None:
        """Give up what is under way, and let go of the database."""
        self._publisher.connection_lost()
        for _, task in self._in_flight:
            task.cancel()
        await asyncio.gather(*(task for _, task in self._in_flight), return_exceptions=True)
        await self._publisher.close()
        await self._engine.release()

    async def run(self) -> None:
        """Publish what is pending, for ever."""
        self._held_due = self._trouble.may_fit(await self._engine.held(), self._stream_bytes)
        after = 0
        while True:
            try:
                await self._send_held()
                after = await self._send_all(after)
                if not self._again:
                    await self._idle()
                if self._again:
                    await self._begin_again()
            except _SpanCut as cut:
                await self._engine.release()
                after = cut.after
            except PublishFailed:
                await self._engine.release()
                await asyncio.sleep(RETRY_S)
                after = 0

    async def _begin_again(self) -> None:
        await self._engine.release()
        # Else the last part of a batch whose first one was refused would count for all of it.
        while self._in_flight:
            await self._settle(wait=True)
        self._again = False
        self._engine.replica.outgoing.keep_together()
        self._held_due = True
        self._held_sent = self._held_settled = HELD
        self._trouble.begin_again()

    async def _send_held(self) -> None:
        while self._held_due:
            packed = await self._engine.take_outgoing(self._held_sent)
            for group in packed:
                await self._send(group)
                self._held_sent = max(self._held_sent, group.through)
            self._held_due = bool(packed)

    async def _send_all(self, after: int) -> int:
        """Publish until nothing is left, or something is to be tried again: an application may never rest. Returns the
        last batch that was handed to the stream as a whole."""
        looks = 0
        while looks < len(LOOK_AGAIN_S) and not self._again:
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
            group.number, group.payload, group.newest_ms, on_late=partial(self._trouble.late, group)
        )
        self._in_flight.append((group, asyncio.create_task(publication)))
        await asyncio.sleep(0)  # lets the publication reach the connection, in the order of the calls

    def _bytes_in_flight(self) -> int:
        return sum(len(group.payload) for group, _ in self._in_flight)

    async def _settle(self, *, wait: bool) -> None:
        """Take note of acknowledgements, in order; `wait`: for at least the first. Raises PublishFailed, _SpanCut."""
        while self._in_flight and (wait or self._in_flight[0][1].done()):
            group, task = self._in_flight[0]
            try:
                published = await task
            except GroupTooLarge as refusal:
                self._in_flight.popleft()
                await self._refused(group, refusal)
            except PublishFailed as failure:
                self._trouble.failed(group, failure)
                await self._send_again()
                raise
            else:
                self._in_flight.popleft()
                await self._acknowledged(group, published)
            wait = False

    async def _send_again(self) -> None:
        """What is under way may be stored or not: all of it is sent again."""
        await asyncio.gather(*(each for _, each in self._in_flight), return_exceptions=True)
        self._in_flight.clear()
        if self._held_sent > self._held_settled:
            self._held_due, self._held_sent = True, self._held_settled

    async def _refused(self, group: Packed, refusal: GroupTooLarge) -> None:
        if group.lo < group.hi:
            self._trouble.cut(group, refusal)
            self._engine.metrics.oversized_transactions.inc(1)
            self._engine.replica.outgoing.keep_apart(group.lo, group.hi)
            await self._send_again()
            raise _SpanCut(group.lo - 1)
        rows = await self._engine.write(partial(self._engine.replica.outgoing.hold, group.hi))
        self._trouble.refused(group, refusal, rows)
        self._note_settled(group)

    async def _acknowledged(self, group: Packed, published: Published) -> None:
        self._trouble.acknowledged(group)
        self._note_settled(group)
        if group.is_held and self._trouble.was_refused(group):
            return  # another part of it: all of them are sent again
        self._unread.append((max(published.sequences) if self.mode.replicate else 0, group))
        await self._mark_read()

    def _note_settled(self, group: Packed) -> None:
        if group.is_held:
            self._held_settled = max(self._held_settled, group.through)

    async def _mark_read(self) -> None:
        """Groups that this node has seen in the stream are published, once and for all."""
        while self._unread and self._unread[0][0] <= self._own_position:
            group = self._unread.popleft()[1]
            await self._engine.published(group)
            self._trouble.published(group)

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
        self._trouble.all_done()
        await self._wakeup.wait(self.mode.polling_s)
