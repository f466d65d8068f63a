"""Reading one stream of the log: in order, without gaps, for as long as it takes.

A reader is a JetStream pull consumer that lives only as long as it is asked (ephemeral, in memory, no
acknowledgements): the position is kept by whoever applies the groups. When the consumer, the server or the
connection goes away, the next read makes another one at the right sequence, after the gap test.
https://docs.nats.io/nats-concepts/jetstream/consumers
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nats.aio.client import Client

from harmonylite import wire
from harmonylite.model import Delivery, Position, ReceivedGroup, Undecodable, Unread
from harmonylite.stream.lineage import goes_on_from_empty, note_emptied, same_log
from harmonylite.stream.log import (
    LogError,
    LogSettings,
    StreamUnavailable,
    parse_time_ns,
    stored_time_ns,
    stream_state,
)
from harmonylite.stream.pull import (
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_MESSAGES,
    PULL_EXPIRES_S,
    PullSession,
    StoredMessage,
)

log = logging.getLogger(__name__)

# The least time between two attempts to make a consumer.
RETRY_S = 0.25
# Decoding more than this (about 2 ms) would hold up the event loop.
INLINE_DECODE_BYTES = 32 * 1024

# (stream, sequence, group number) -> whether this process published that and has its acknowledgement
IsOwn = Callable[[str, int, int], bool]


class GapFound(LogError):  # noqa: N818 - what was found
    """The stream does not go on after the position: messages are missing, or it is another log. Reconcile.

    expected: the sequence that should have come next; found: the one that came, None if none did; lost: the stream
    forgot messages that it had acknowledged, or is another one.
    """

    def __init__(self, stream: str, expected: int, found: int | None, reason: str, *, lost: bool = False) -> None:
        super().__init__(f"stream {stream} does not go on at {expected}: {reason}")
        self.stream = stream
        self.expected = expected
        self.found = found
        self.reason = reason
        self.lost = lost


@dataclass(slots=True)
class _Joined:
    """Payloads that are complete, each with its last message, and messages that are no parts."""

    payloads: list[tuple[StoredMessage, wire.Part, bytes]] = field(default_factory=list)
    undecodable: list[Undecodable] = field(default_factory=list)


class Consumer:
    """Reads a stream from just after `position`. One `read()` at a time.

    is_own (Publisher.is_own) with tolerance_ms: messages of this process are passed without being decoded, unless a
    version in them lies more than the tolerance after the time they were stored at.
    emptied: see `note_emptied`; for as long as the process runs.
    joiner makes an empty Joiner, whenever reading starts again: its limits bound what open groups hold in memory.
    """

    def __init__(
        self,
        client: Client,
        settings: LogSettings,
        stream: str,
        position: Position,
        *,
        is_own: IsOwn | None = None,
        tolerance_ms: int = 0,
        emptied: dict[str, Position] | None = None,
        joiner: Callable[[], wire.Joiner] = wire.Joiner,
    ) -> None:
        self._client = client
        self._settings = settings
        self._stream = stream
        self._is_own = is_own
        self._tolerance_ms = tolerance_ms
        self._emptied = {} if emptied is None else emptied
        self._new_joiner = joiner
        self._position = position
        self._session: PullSession | None = None
        self._gap: GapFound | None = None
        self._checked = False
        self._taken = (0, 0)
        # Times of the messages just before groups that opened: the position may have to stay there.
        self._marks: dict[int, int] = {}
        self._next_start = 0.0
        self._start_over()

    @property
    def position(self) -> Position:
        """The position after everything that `read()` returned."""
        return self._position

    @property
    def read_through(self) -> int:
        """The last sequence that was read; the position stays behind it while a group is open."""
        return self._last_sequence

    @property
    def taken(self) -> tuple[int, int]:
        """Messages and bytes that the last read looked at."""
        return self._taken

    @property
    def checked(self) -> bool:
        """Whether the stream was found to go on after the position (the gap test)."""
        return self._checked

    async def read(
        self,
        *,
        max_messages: int = DEFAULT_MAX_MESSAGES,
        max_bytes: int = DEFAULT_MAX_BYTES,
        wait_s: float = PULL_EXPIRES_S,
    ) -> Delivery:
        """Return what there is, as soon as there is something, or nothing new after `wait_s`.

        One read looks at no more than `max_messages`, and at `max_bytes` of payload plus one message; the parts of a
        group that is still open are kept beside that. A delivery without groups can still move the position.
        Groups between the parts of a group that was open at the position come again after a restart, or when so
        many bytes of open groups came at a time that one of them has to be read again.

        Raises GapFound (again on every call; what came before the gap was returned), StreamMissing, ApiError, or
        StreamUnavailable if no consumer could be had within `wait_s` (at once if the client is closed): a later read
        tries again.
        """
        deadline = time.monotonic() + wait_s
        while True:
            if self._gap is not None:
                raise self._gap
            session = await self._open_session(deadline)
            messages = session.take(max_messages, max_bytes)
            self._taken = len(messages), sum(len(message.data) for message in messages)
            if messages:
                delivery = await self._deliver(messages, session)
                if delivery is not None:
                    return delivery
            elif session.idle and self._last_sequence < session.goal:
                await self._check_tail(session)
            if time.monotonic() >= deadline:
                return Delivery(self._position)
            await session.wait(deadline)

    def wake(self) -> None:
        """Look at the connection now rather than within a second: it was lost, or made again."""
        if self._session is not None:
            self._session.wake()

    async def close(self) -> None:
        """Give the consumer back to the server."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _open_session(self, deadline: float) -> PullSession:
        """The session, with a pull request open or messages to take; made anew if it was lost."""
        while True:
            session = self._session
            try:
                if session is None:
                    session = self._session = await self._start_session(deadline)
                await session.pull(DEFAULT_MAX_MESSAGES, DEFAULT_MAX_BYTES)
                if not session.lost:
                    return session
                fields = {"stream": self._stream, "sequence": self._last_sequence, "reason": session.lost}
                log.info("reading is interrupted, starts again", extra={"fields": fields})
                await self.close()
            except StreamUnavailable:
                if self._client.is_closed or time.monotonic() >= deadline:
                    raise

    async def _start_session(self, deadline: float) -> PullSession:
        """Gap test, then a consumer after the last message seen. Raises GapFound and what the log raises."""
        now = time.monotonic()
        await asyncio.sleep(max(0.0, min(self._next_start, deadline) - now))
        self._next_start = time.monotonic() + RETRY_S
        state = await stream_state(self._client, self._settings, self._stream)
        seen = Position(self._stream, self._position.created, self._last_sequence, self._last_ns)
        lineage = await same_log(self._client, self._settings, state, seen)
        if lineage.intact:
            note_emptied(self._emptied, state, seen)
        elif self._emptied.get(self._stream) != seen or not goes_on_from_empty(state, seen):
            found = state.first_seq if state.first_seq > seen.sequence + 1 else None
            same = not seen.created or parse_time_ns(seen.created) == parse_time_ns(state.created)
            raise self._broken(found, lineage.reason, lost=found is None or not same)
        self._checked = True
        if not self._position.created:
            position = self._position
            self._position = Position(position.stream, state.created, position.sequence, position.stored_ns)
        return await PullSession.start(
            self._client, self._settings, self._stream, self._last_sequence + 1, goal=state.last_seq
        )

    async def _check_tail(self, session: PullSession) -> None:
        """The stream had messages up to the goal, but none comes: deleted ones are passed over in silence."""
        state = await stream_state(self._client, self._settings, self._stream)
        if await stored_time_ns(self._client, self._settings, state, session.goal) is None:
            raise self._broken(None, f"messages up to {session.goal} are missing")
        session.give_up(f"message {session.goal} exists but is not delivered")

    def _broken(self, found: int | None, reason: str, *, lost: bool = False) -> GapFound:
        self._gap = GapFound(self._stream, self._last_sequence + 1, found, reason, lost=lost)
        return self._gap

    async def _deliver(self, messages: Sequence[StoredMessage], session: PullSession) -> Delivery | None:
        """Join and decode; None if that neither yields anything nor moves the position."""
        try:
            joined = self._join(messages)
            position = self._position_now()
            if not (joined.payloads or joined.undecodable) and position == self._position:
                return None
            await session.pull_more()  # what comes next travels while this is decoded and applied
            if sum(len(payload) for _, _, payload in joined.payloads) > INLINE_DECODE_BYTES:
                groups, undecodable = await asyncio.to_thread(_decode, joined)
            else:
                groups, undecodable = _decode(joined)
        except BaseException:
            # Cancelled, say: what was taken is not delivered, so the next read has to begin before it.
            self._start_over()
            session.give_up("a read was given up")
            raise
        self._position = position
        self._marks = {mark: ns for mark, ns in self._marks.items() if mark >= position.sequence}
        if self._joiner.must_read_again:
            # The shelved group begins just after the position, which has moved since reading began.
            self._start_over()
            session.give_up("a group did not fit beside older ones and is read again")
        return Delivery(position, groups, undecodable)

    def _start_over(self) -> None:
        self._last_sequence = self._position.sequence
        self._last_ns = self._position.stored_ns
        self._joiner = self._new_joiner()
        self._marks = {}

    def _join(self, messages: Sequence[StoredMessage]) -> _Joined:
        joined = _Joined()
        for message in messages:
            if message.sequence != self._last_sequence + 1:
                self._broken(message.sequence, f"message {message.sequence} came")
                break
            self._take_part(message, joined)
            self._last_sequence, self._last_ns = message.sequence, message.stored_ns
            if self._joiner.must_read_again:
                break
        return joined

    def _take_part(self, message: StoredMessage, joined: _Joined) -> None:
        try:
            part = wire.parse_part(message.data)
            if message.subject.rpartition(".")[2] != str(part.publisher):
                raise wire.WireError(f"node {part.publisher} may not publish on {message.subject}")
            if self._may_skip(message, part):
                return
            if part.index == 0 and part.count > 1:
                self._marks[self._last_sequence] = self._last_ns
            payload = self._joiner.add(part, message.sequence, message.stored_ns // 1_000_000)
        except wire.NotReadableHereError as error:
            joined.undecodable.append(Undecodable(message.sequence, message.data, str(error), _unread(message)))
            return
        except wire.WireError as error:
            joined.undecodable.append(Undecodable(message.sequence, message.data, str(error)))
            return
        if payload is not None:
            joined.payloads.append((message, part, payload))

    def _may_skip(self, message: StoredMessage, part: wire.Part) -> bool:
        """Nothing of an own message is new here: the versions in it came from this database.

        Not while a group is open: if it is ours, this message may be the one that ends it.
        """
        return (
            self._is_own is not None
            and part.publisher == self._settings.node_id
            and self._joiner.open_groups == 0
            and part.max_ts <= message.stored_ns // 1_000_000 + self._tolerance_ms
            and self._is_own(self._stream, message.sequence, part.number)
        )

    def _position_now(self) -> Position:
        first_open = self._joiner.first_open_sequence()
        sequence, stored_ns = self._last_sequence, self._last_ns
        if first_open is not None:
            sequence = first_open - 1
            stored_ns = self._marks.get(sequence, 0)
        return Position(self._stream, self._position.created, sequence, stored_ns)


def _decode(joined: _Joined) -> tuple[tuple[ReceivedGroup, ...], tuple[Undecodable, ...]]:
    decoded = [_decode_one(message, part, payload) for message, part, payload in joined.payloads]
    groups = tuple(one for one in decoded if isinstance(one, ReceivedGroup))
    bad = [one for one in decoded if isinstance(one, Undecodable)]
    return groups, tuple(sorted([*joined.undecodable, *bad], key=lambda message: message.sequence))


def _unread(message: StoredMessage) -> Unread | None:
    """None if no node may send on the message's subject."""
    publisher = message.subject.rpartition(".")[2]
    # Not isdigit() alone, which takes other digits than int() does.
    if not (publisher.isascii() and publisher.isdigit()) or int(publisher) > wire.MAX_INTEGER:
        return None
    return Unread(message.stored_ns // 1_000_000, int(publisher), joined=False)


def _decode_one(message: StoredMessage, part: wire.Part, payload: bytes) -> ReceivedGroup | Undecodable:
    try:
        group = wire.decode_group(payload)
        if (group.publisher, group.number) != (part.publisher, part.number):
            raise wire.WireError(
                f"group {group.number} of node {group.publisher} came as {part.number} of {part.publisher}"
            )
    except wire.NotReadableHereError as error:
        unread = Unread(message.stored_ns // 1_000_000, part.publisher, joined=True)
        return Undecodable(message.sequence, payload, str(error), unread)
    except wire.WireError as error:
        return Undecodable(message.sequence, payload, str(error))
    return ReceivedGroup(group, message.sequence, message.stored_ns // 1_000_000)
