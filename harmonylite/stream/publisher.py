"""Publishing groups to the log: parts, atomic batches, acknowledgements.

`publish()` may be called again before an earlier one has returned: messages enter the connection in the order of the
calls, acknowledgements come back in their own time. One inbox serves all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from harmonylite import wire
from harmonylite.stream.log import LogError, LogSettings, StreamState, raise_error, stored_time_ns, stream_state

log = logging.getLogger(__name__)

# What one atomic batch may hold (server 2.12 to 2.15; more is refused with 10199).
MAX_BATCH_MESSAGES = 1000
# Largest part, whatever the server allows: it bounds what a reader holds, and a hub may allow less than its leaf.
MAX_PART_BYTES = 1 << 20
# The server counts headers as payload: ours, and those of a direct get, which answers with the whole message.
HEADER_ROOM_BYTES = 1024
# What a stored message takes beside payload and subject (22 bytes in front, 8 behind, 4 for the length of headers), and
# the headers of a batch: https://github.com/nats-io/nats-server/blob/main/server/filestore.go, fileStoreMsgSizeRaw
STORED_ROOM_BYTES, BATCH_HEADERS_BYTES = 34, 128
# An acknowledgement is given up when the link would have been slower than this for everything under way.
SLOWEST_LINK_BYTES_PER_S = 16 * 1024
# Readers keep the parts of a group in memory, and refuse one of which they would keep more (wire.Joiner): it would be
# in the log, acknowledged, and at no other node.
MAX_GROUP_BYTES = wire.DEFAULT_MAX_OPEN_BYTES
# First to last part of a group, server time: well under what readers wait for the rest of a group (wire.Joiner).
MAX_SPAN_NS = 1_200_000_000_000
# How many of its own messages a publisher remembers: a reader is rarely further behind than this.
OWN_MESSAGES = 65536


class PublishFailed(LogError):  # noqa: N818 - what happened to the group
    """A group was not acknowledged. It may be stored all the same, now or later: send it again as a new group."""


class GroupTooLarge(PublishFailed):
    """The stream cannot hold the group, not even alone, and nothing of it was sent. size, limit: bytes.

    A server does not refuse it: it acknowledges the group, and then discards the oldest messages until the rest is
    small enough, the group's own among them (nats-server 2.15: all of an atomic batch).
    """

    to_do = "raise [nats] max_store where the stream is, or lower max_transaction_bytes here: it then arrives in steps"

    def __init__(self, group_number: int, stream: str, size: int, limit: int) -> None:
        super().__init__(f"group {group_number} takes {size} bytes, {self._bound(stream, limit)}")
        self.stream = stream
        self.size = size
        self.limit = limit

    @property
    def bound(self) -> str:
        """What is smaller than the group."""
        return self._bound(self.stream, self.limit)

    @staticmethod
    def _bound(stream: str, limit: int) -> str:
        return f"stream {stream} holds {limit}"


class GroupUnreadable(GroupTooLarge):
    """No node would take the group: its parts are more than one keeps until they are complete."""

    to_do = "make the rows smaller: keep large contents in several rows, or in files"

    @staticmethod
    def _bound(stream: str, limit: int) -> str:
        return f"a node takes {limit} in one piece"


@dataclass(frozen=True, slots=True)
class Published:
    """An acknowledged group. `sequences`: of its messages, ascending; `stored_bytes`: their payload."""

    stream: str
    sequences: tuple[int, ...]
    stored_bytes: int


class Publisher:
    """Publishes this node's groups over one connected client. Not for more than one event loop.

    timeout_s: how long an acknowledgement may take beyond what a slow link explains.
    """

    def __init__(self, client: Client, settings: LogSettings, *, timeout_s: float = 10.0) -> None:
        self._client = client
        self._stream = settings.own_stream
        self._subject = settings.own_subject
        self._settings = settings
        self._timeout_s = timeout_s
        self._sending = asyncio.Lock()  # FIFO: groups never interleave in the connection
        self._inbox = f"{client.new_inbox()}."
        self._subscription: Any = None
        self._last_token = 0
        self._waiting: dict[str, asyncio.Future[Msg | str]] = {}
        self._in_flight_bytes = 0
        self._state: StreamState | None = None  # None: not asked yet
        self._own: OrderedDict[int, int] = OrderedDict()  # sequence -> group number

    async def publish(
        self, group_number: int, payload: bytes, max_ts: int, *, on_late: Callable[[float], None] | None = None
    ) -> Published:
        """Publish an encoded group and wait until the stream has stored all of it.

        max_ts: the newest version in it, milliseconds. on_late: called with the seconds when they were more than
        `timeout_s`; a slow link may need longer, and so waiting goes on. Raises PublishFailed, of which GroupTooLarge
        is for good.
        """
        room = min(self._client.max_payload, MAX_PART_BYTES) - HEADER_ROOM_BYTES
        parts = wire.split(
            payload, publisher=self._settings.node_id, number=group_number, max_ts=max_ts, max_bytes=room
        )
        size = sum(map(len, parts))
        self._in_flight_bytes += size
        acks: dict[str, asyncio.Future[Msg | str]] = {}
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []
        try:
            async with self._sending:
                # One message is not worth a question: whoever cares has told (`stream_seen`).
                state = self._state if len(parts) == 1 else await self._stream_state()
                self._check_size(group_number, len(parts), size, state)
                atomic = state is not None and state.atomic and 1 < len(parts) <= MAX_BATCH_MESSAGES
                batch = uuid.uuid4().hex if atomic else None
                await self._send(parts, batch, acks)
            patience_s = self._timeout_s + self._in_flight_bytes / SLOWEST_LINK_BYTES_PER_S
            timers.append(loop.call_later(patience_s, _give_up, acks, patience_s))
            if on_late is not None:
                timers.append(loop.call_later(self._timeout_s, on_late, self._timeout_s))
            sequences = await self._collect(acks, batch, len(parts))
            if batch is None and len(parts) > 1:
                await self._check_span(sequences)
        except GroupTooLarge:
            raise
        except (nats.errors.Error, LogError) as error:
            raise PublishFailed(f"group {group_number} was not acknowledged: {error}") from error
        finally:
            self._in_flight_bytes -= size
            for timer in timers:
                timer.cancel()
            for token in acks:
                self._waiting.pop(token, None)
        self._remember(group_number, sequences)
        return Published(self._stream, sequences, size)

    def is_own(self, stream: str, sequence: int, group_number: int) -> bool:
        """Whether this process published that group there and has the acknowledgement (as far as it remembers).

        The sequence alone would not do: a log that lost its tail gives sequences out again.
        """
        return stream == self._stream and self._own.get(sequence) == group_number

    def sent_all(self, first: int, last: int) -> bool:
        """Whether all messages of the own stream from `first` to `last` are this process's, as far as it remembers."""
        return last - first < OWN_MESSAGES and all(sequence in self._own for sequence in range(first, last + 1))

    def connection_lost(self) -> None:
        """Fail what is under way at once: acknowledgements do not come back over another connection."""
        for ack in self._waiting.values():
            if not ack.done():
                ack.set_result("the connection was lost")

    async def close(self) -> None:
        """Fail what is under way and give the inbox back."""
        self.connection_lost()
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not self._client.is_closed:
            await subscription.unsubscribe()

    def stream_seen(self, state: StreamState) -> bool:
        """The own stream's settings as they are now; True if its bound is another one than groups were measured by."""
        known, self._state = self._state, state
        return known is not None and known.max_bytes != state.max_bytes

    def _check_size(self, group_number: int, parts: int, payload_bytes: int, state: StreamState | None) -> None:
        each = len(self._subject) + STORED_ROOM_BYTES + (BATCH_HEADERS_BYTES if parts > 1 else 0)
        size = payload_bytes + parts * each
        if parts > 1 and size > MAX_GROUP_BYTES:
            raise GroupUnreadable(group_number, self._stream, size, MAX_GROUP_BYTES)
        if state is not None and state.max_bytes is not None and size > state.max_bytes:
            raise GroupTooLarge(group_number, self._stream, size, state.max_bytes)

    async def _stream_state(self) -> StreamState:
        """The stream's settings; they are asked for once, and again after they turned out to have changed."""
        if self._state is None:
            self._state = await stream_state(self._client, self._settings, self._stream)
        return self._state

    async def _check_span(self, sequences: Sequence[int]) -> None:
        """Readers drop a group whose parts are far apart by the server's clock, after a suspend or a clock step."""
        state = await self._stream_state()
        first, last = [
            await stored_time_ns(self._client, self._settings, state, sequence)
            for sequence in (min(sequences), max(sequences))
        ]
        if first is None or last is None or not 0 <= last - first <= MAX_SPAN_NS:
            raise LogError(f"its parts {min(sequences)} and {max(sequences)} are too far apart for readers")

    async def _send(
        self, parts: Sequence[bytes], batch: str | None, acks: dict[str, asyncio.Future[Msg | str]]
    ) -> None:
        """Write the parts to the connection, in order; `acks` gets the answers to expect, in order.

        In a batch only the first message (refusals) and the last (the commit) are answered. Not waiting for the
        first answer is safe: once the first is refused, the server refuses the rest as an unknown batch.
        """
        if self._subscription is None:
            self._subscription = await self._client.subscribe(f"{self._inbox}*", cb=self._on_answer)
        last = len(parts)
        for index, part in enumerate(parts, start=1):
            if not self._client.is_connected:  # it would be buffered, and stored who knows when
                raise LogError("not connected to NATS")
            headers = None
            if batch is not None:
                headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(index)}
                if index == last:
                    headers["Nats-Batch-Commit"] = "1"
            reply = ""
            if batch is None or index in (1, last):
                token = self._new_token()
                acks[token] = self._waiting[token] = asyncio.get_running_loop().create_future()
                reply = self._inbox + token
            await self._client.publish(self._subject, part, reply=reply, headers=headers)

    def _new_token(self) -> str:
        self._last_token += 1
        return str(self._last_token)

    async def _on_answer(self, message: Msg) -> None:
        ack = self._waiting.pop(message.subject[len(self._inbox) :], None)
        if ack is not None and not ack.done():
            ack.set_result(message)

    async def _collect(
        self, acks: dict[str, asyncio.Future[Msg | str]], batch: str | None, parts: int
    ) -> tuple[int, ...]:
        """The sequences of all parts. Raises LogError for the first that was refused or not answered."""
        answers = list(acks.values())
        if batch is None:
            return tuple([self._stored_sequence(await answer) for answer in answers])
        first, commit = answers
        opened = await first
        if not isinstance(opened, str) and opened.data:
            self._state = None  # refused, or a server that stores each message by itself
            self._stored_sequence(opened)
            raise LogError(f"stream {self._stream} does not take atomic batches any more")
        if isinstance(opened, str) or _no_responders(opened):
            self._stored_sequence(opened)
        last = self._stored_sequence(await commit)
        return tuple(range(last - parts + 1, last + 1))

    def _stored_sequence(self, answer: Msg | str) -> int:
        """Read an acknowledgement. Raises LogError if it is none, ApiError if it is a refusal."""
        if isinstance(answer, str):
            raise LogError(answer)
        if _no_responders(answer):
            raise LogError(f"no stream takes {self._subject}: the stream is missing or its hub is not reachable")
        try:
            ack = json.loads(answer.data)
            raise_error(f"a message on {self._subject}", ack)
            stream, sequence = str(ack["stream"]), int(ack["seq"])
        except (ValueError, KeyError, TypeError):
            raise LogError(f"not an acknowledgement: {answer.data[:80]!r}") from None
        if stream != self._stream:
            raise LogError(f"stream {stream} took {self._subject}, it belongs to {self._stream}")
        return sequence

    def _remember(self, group_number: int, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._own[sequence] = group_number
        while len(self._own) > OWN_MESSAGES:
            self._own.popitem(last=False)


def _no_responders(answer: Msg) -> bool:
    return not answer.data and (answer.headers or {}).get("Status") == "503"


def _give_up(acks: dict[str, asyncio.Future[Msg | str]], patience_s: float) -> None:
    for ack in acks.values():
        if not ack.done():
            ack.set_result(f"no acknowledgement in {patience_s:.0f} s")
