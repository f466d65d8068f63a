"""One pull consumer on the server, and the inbox in which its messages arrive.

Pull requests stay open while nothing comes, so that a message travels at once; statuses of the server end them:
https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-13.md
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from harmonylite.stream.log import LogError, LogSettings, api_request

DEFAULT_MAX_MESSAGES = 256
DEFAULT_MAX_BYTES = 8 << 20
# A pull request stays open this long while nothing comes; heartbeats tell that somebody still serves it.
PULL_EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
# Without any sign for this long the consumer is gone: through a leaf nobody says so.
SILENCE_S = 2.5 * HEARTBEAT_S
# The server deletes a consumer that nobody pulls from for this long.
INACTIVE_S = 30.0
# How often a reader that waits looks whether the client reconnected meanwhile.
LOOK_S = 1.0
DELETE_TIMEOUT_S = 1.0

_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as the stream holds it. stored_ns: the server's time, nanoseconds since 1970."""

    subject: str
    data: bytes
    sequence: int
    stored_ns: int


class PullSession:
    """An ephemeral consumer that begins at one sequence. When it is lost, another has to be made.

    goal: the stream's last sequence at its beginning, which has to be reached.
    idle: a heartbeat came since the last message: the server has nothing more to deliver.
    """

    def __init__(self, client: Client, settings: LogSettings, stream: str, goal: int) -> None:
        self.goal = goal
        self.idle = False
        self._client = client
        self._settings = settings
        self._stream = stream
        self._name = f"harmonylite-{settings.node_id}-{uuid.uuid4().hex[:16]}"
        self._inbox = client.new_inbox()
        self._subscription: Any = None
        self._reconnects = client.stats["reconnects"]
        self._batch, self._bytes = DEFAULT_MAX_MESSAGES, DEFAULT_MAX_BYTES
        self._pull_left = 0  # messages that the open pull request may still bring; 0: none is open
        self._heard = time.monotonic()
        self._received: deque[StoredMessage] = deque()
        self._received_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._lost = ""

    @classmethod
    async def start(
        cls, client: Client, settings: LogSettings, stream: str, first_sequence: int, *, goal: int
    ) -> PullSession:
        """Make the consumer. Raises StreamUnavailable or ApiError."""
        session = cls(client, settings, stream, goal)
        config = {
            "name": session._name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": first_sequence,
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": int(INACTIVE_S * _NANOSECONDS),
            "mem_storage": True,
            "num_replicas": 1,
        }
        body = {"stream_name": stream, "config": config}
        try:
            await api_request(client, settings, f"CONSUMER.CREATE.{stream}.{session._name}", body)
            session._subscription = await client.subscribe(session._inbox, cb=session._on_message)
        except BaseException:
            await session.close()
            raise
        return session

    @property
    def lost(self) -> str:
        """Why this session is of no use any more; empty while it is."""
        if not self._lost and self._client.stats["reconnects"] != self._reconnects:
            self._lost = "the client reconnected"
        if not self._lost and not self._client.is_connected:
            self._lost = "not connected"
        if not self._lost and self._pull_left and time.monotonic() - self._heard > SILENCE_S:
            self._lost = "the server is silent"
        return self._lost

    def give_up(self, reason: str) -> None:
        """Call this session lost; what it received does not count."""
        self._lost = self._lost or reason
        self._received.clear()
        self._received_bytes = 0

    async def pull(self, max_messages: int, max_bytes: int) -> None:
        """Have a pull request open, unless there is something to take."""
        # A message larger than the request's bytes would never be delivered.
        self._batch, self._bytes = max_messages, max(max_bytes, 2 * self._client.max_payload)
        if not self._received:
            await self.pull_more()

    async def pull_more(self) -> None:
        """Open the next pull request if the last one is finished, unless much of what it brought is still here."""
        if self._pull_left or self.lost:
            return
        if 2 * len(self._received) >= self._batch or 2 * self._received_bytes >= self._bytes:
            return
        self._pull_left, self._heard, self.idle = self._batch, time.monotonic(), False
        request = {
            "batch": self._batch,
            "max_bytes": self._bytes,
            "expires": int(PULL_EXPIRES_S * _NANOSECONDS),
            "idle_heartbeat": int(HEARTBEAT_S * _NANOSECONDS),
        }
        subject = f"{self._settings.api_prefix}.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        try:
            await self._client.publish(subject, json.dumps(request).encode(), reply=self._inbox)
        except nats.errors.Error as error:
            self._lost = str(error)

    def take(self, max_messages: int, max_bytes: int) -> list[StoredMessage]:
        """What has arrived, in order: up to `max_messages`, and no further than where `max_bytes` is reached."""
        taken: list[StoredMessage] = []
        size = 0
        while self._received and len(taken) < max_messages and size < max_bytes:
            taken.append(self._received.popleft())
            size += len(taken[-1].data)
        self._received_bytes -= size
        return taken

    async def wait(self, deadline: float) -> None:
        """Return when something arrived, on `wake()`, after LOOK_S, or at `deadline` (monotonic seconds).

        At once when no pull request is open: nothing would come.
        """
        if self._received or self._lost or not self._pull_left:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(max(0.0, min(LOOK_S, deadline - time.monotonic())), self.wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def wake(self) -> None:
        """End a `wait()`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def close(self) -> None:
        """Delete the consumer and the inbox; the server does it by itself when it cannot be reached now."""
        self._lost = self._lost or "closed"
        self.wake()
        if self._subscription is not None and not self._client.is_closed:
            with contextlib.suppress(nats.errors.Error):
                await self._subscription.unsubscribe()
        with contextlib.suppress(LogError):
            request = f"CONSUMER.DELETE.{self._stream}.{self._name}"
            await api_request(self._client, self._settings, request, timeout_s=DELETE_TIMEOUT_S)

    async def _on_message(self, message: Msg) -> None:
        self._heard = time.monotonic()
        if message.reply.startswith("$JS.ACK."):
            self._received.append(_stored_message(message))
            self._received_bytes += len(message.data)
            self._pull_left = max(0, self._pull_left - 1)
            self.idle = False
        else:
            self._on_status(message.headers or {})
        self.wake()

    def _on_status(self, headers: Mapping[Any, str]) -> None:
        # nats-py's names of headers are strings or members of an enumeration, which hash differently.
        by_name = {getattr(name, "value", name): value.strip() for name, value in headers.items()}
        status, description = by_name.get("Status", ""), by_name.get("Description", "")
        if status == "100":
            self.idle = not self._received
        elif status in ("404", "408") or description in ("Message Size Exceeds MaxBytes", "Batch Completed"):
            self._pull_left = 0
        else:
            self._lost = f"{status} {description}".strip() or "a message without a status"


def _stored_message(message: Msg) -> StoredMessage:
    """Sequence and time are in the reply subject.

    $JS.ACK.<stream>.<consumer>.<delivered>.<stream sequence>.<consumer sequence>.<time>.<pending>, or with a domain
    and an account hash before the stream, and possibly more at the end.
    """
    tokens = message.reply.split(".")
    sequence, stored_ns = (tokens[5], tokens[7]) if len(tokens) == 9 else (tokens[7], tokens[9])
    return StoredMessage(message.subject, message.data, int(sequence), int(stored_ns))
