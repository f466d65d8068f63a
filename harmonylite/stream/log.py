"""The JetStream log of changes: its names, and its streams as the server describes them.

One stream per shard; a publisher always writes to the shard that its node id hashes to. Everything here is plain
request and reply over a connected client: the JetStream API is JSON, and reading it as such keeps what the server
says (its `created` and `ts`) to the nanosecond, and works with settings newer than the client library.
API: https://docs.nats.io/reference/reference-protocols/nats_api_reference
"""

from __future__ import annotations

import asyncio
import calendar
import json
import logging
import re
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from harmonylite.tasks import undisturbed

log = logging.getLogger(__name__)

# Error codes of the server: https://github.com/nats-io/nats-server/blob/main/server/errors.json
STREAM_NOT_FOUND = 10059
# How long the consumer that tells the time lives when it cannot be deleted, and how long that may take.
_CLOCK_CONSUMER_NS = 5_000_000_000
_CLOCK_DELETE_S = 1.0

_RFC3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)$")


class LogError(Exception):
    """The log cannot be used. One line for the operator: what, where, what to do."""


class StreamUnavailable(LogError):  # noqa: N818 - a state of the log
    """No answer now: no connection, no JetStream, or no permission (which looks the same from a client)."""


class StreamMissing(LogError):  # noqa: N818
    """The stream does not exist."""


class ApiError(LogError):
    """JetStream refused a request. `code` is like an HTTP status, `err_code` the server's own, 0 if it gave none."""

    def __init__(self, request: str, code: int, err_code: int, description: str) -> None:
        super().__init__(f"JetStream refused {request}: {description} ({code}/{err_code})")
        self.code = code
        self.err_code = err_code


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Where the log is and how its streams are made.

    max_bytes: size at which a stream discards its oldest messages, -1 for no bound of its own; owns_store: this node's
    server alone holds the streams, so that its max_bytes counts for one that exists, too; replicas: copies in a
    cluster; domain: JetStream domain of the hub, None for the server connected to; compress: groups are
    compressed by their publisher (streams never are: it costs memory and saves nothing, payloads are compressed
    already); update_existing: change a stream whose configuration differs, rather than only say so; api_timeout_s: how
    long an answer of JetStream may take.
    """

    node_id: int
    subject_prefix: str = "harmonylite-change-log"
    stream_prefix: str = "harmonylite-changes"
    shards: int = 1
    replicas: int = 1
    domain: str | None = None
    compress: bool = True
    max_bytes: int = -1
    owns_store: bool = False
    update_existing: bool = False
    api_timeout_s: float = 5.0

    @property
    def api_prefix(self) -> str:
        return f"$JS.{self.domain}.API" if self.domain else "$JS.API"

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.stream(shard) for shard in range(1, self.shards + 1))

    def stream(self, shard: int) -> str:
        return f"{self.stream_prefix}-{shard}"

    def subjects(self, shard: int) -> str:
        """What the stream of a shard captures."""
        return f"{self.subject_prefix}.{shard}.*"

    @property
    def own_shard(self) -> int:
        return shard_of(self.node_id, self.shards)

    @property
    def own_stream(self) -> str:
        return self.stream(self.own_shard)

    @property
    def own_subject(self) -> str:
        """Where this node publishes: `<subject_prefix>.<shard>.<node id>`."""
        return f"{self.subject_prefix}.{self.own_shard}.{self.node_id}"


@dataclass(frozen=True, slots=True)
class ServerTime:
    """The server's clock as it was read for an answer.

    ms: since 1970; round_trip_ms: how long the answer took, so that `ms` is off by at most that; answered:
    time.monotonic() when it came.
    """

    ms: int
    round_trip_ms: float
    answered: float

    def now_ms(self) -> int:
        """What the server's clock shows now; off by at most the round trip."""
        return self.ms + int((time.monotonic() - self.answered) * 1000)


@dataclass(frozen=True, slots=True)
class StreamState:
    """A stream as the server describes it.

    created: RFC 3339, exactly as given; first_seq and last_seq are 0 in a stream that never held a message;
    last_ns: when message last_seq was stored, also if it is gone since, nanoseconds since 1970, None if the server does
    not say; server_ms: the server's clock when it answered, milliseconds since 1970, None before server 2.10 (see
    `ask_time`); round_trip_ms: how long the answer took (so that clock is off by at most that); atomic: takes atomic
    batches; direct: answers direct gets; max_msg_size, max_bytes (of the whole stream): bytes, None for no bound of its
    own; answered: time.monotonic() of the answer.
    """

    name: str
    created: str
    first_seq: int
    last_seq: int
    messages: int
    bytes: int
    server_ms: int | None
    round_trip_ms: float
    atomic: bool = False
    direct: bool = False
    max_msg_size: int | None = None
    max_bytes: int | None = None
    last_ns: int | None = None
    answered: float = field(default_factory=time.monotonic, compare=False)

    @property
    def server_time(self) -> ServerTime | None:
        """The server's clock; None before server 2.10."""
        return None if self.server_ms is None else ServerTime(self.server_ms, self.round_trip_ms, self.answered)

    def timed(self, told: ServerTime) -> StreamState:
        """The same with this as the server's time."""
        return replace(self, server_ms=told.ms, round_trip_ms=told.round_trip_ms, answered=told.answered)


def shard_of(node_id: int, shards: int) -> int:
    """The shard (1 to `shards`) that a publisher writes to: the same on every node and in every version."""
    return zlib.crc32(node_id.to_bytes(8, "big")) % shards + 1


def parse_time_ns(text: str) -> int:
    """RFC 3339 with up to nine decimals, as nanoseconds since 1970. ValueError if it is not that."""
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {text!r}")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    seconds = calendar.timegm((year, month, day, hour, minute, second))
    zone = match[8]
    if zone != "Z":
        offset = int(zone[1:3]) * 3600 + int(zone[4:6]) * 60
        seconds += offset if zone[0] == "-" else -offset
    return seconds * 1_000_000_000 + int((match[7] or "").ljust(9, "0"))


async def api_message(
    client: Client, subject: str, body: bytes, *, timeout_s: float, headers: dict[str, str] | None = None
) -> Msg:
    """Send one request. Raises StreamUnavailable when nobody answers in time, or at once while not connected."""
    if not client.is_connected:  # the client would buffer the request and send it some time later
        raise StreamUnavailable(f"not connected to NATS, {subject} was not sent")
    try:
        return await undisturbed(client.request(subject, body, timeout=timeout_s, headers=headers))
    except nats.errors.NoRespondersError:
        raise StreamUnavailable(
            f"nobody answers {subject}: JetStream is off, still starting, or its hub is not reachable"
        ) from None
    except (nats.errors.TimeoutError, asyncio.TimeoutError):
        raise StreamUnavailable(
            f"no answer to {subject} in {timeout_s:g} s: the hub is not reachable, or this user may not ask"
        ) from None
    except nats.errors.Error as error:
        raise StreamUnavailable(f"{subject} could not be sent: {error}") from None


async def api_request(
    client: Client,
    settings: LogSettings,
    request: str,
    body: Mapping[str, object] | None = None,
    *,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Ask the JetStream API (`request`: such as `STREAM.INFO.name`). Raises StreamUnavailable or ApiError.

    timeout_s: instead of the settings' api_timeout_s.
    """
    data = b"" if body is None else json.dumps(body).encode()
    message = await api_message(
        client, f"{settings.api_prefix}.{request}", data, timeout_s=timeout_s or settings.api_timeout_s
    )
    answer: dict[str, Any] = json.loads(message.data)
    raise_error(request, answer)
    return answer


def raise_error(request: str, answer: Mapping[str, Any]) -> None:
    """Raise the ApiError that an answer of JetStream carries, if it does."""
    error = answer.get("error")
    if error is not None:
        code = int(error.get("code", 0))
        raise ApiError(request, code, int(error.get("err_code", 0)), str(error.get("description", "no reason")))


async def stream_state(client: Client, settings: LogSettings, stream: str) -> StreamState:
    """Ask for a stream's state. Raises StreamUnavailable, StreamMissing or ApiError."""
    info, round_trip_ms = await stream_info(client, settings, stream)
    return state_of(stream, info, round_trip_ms)


async def stream_info(client: Client, settings: LogSettings, stream: str) -> tuple[dict[str, Any], float]:
    """A stream as the server describes it, and how many milliseconds that took. Raises as `stream_state`."""
    started = time.monotonic()
    try:
        info = await api_request(client, settings, f"STREAM.INFO.{stream}")
    except ApiError as error:
        if error.err_code == STREAM_NOT_FOUND:
            raise StreamMissing(f"stream {stream} does not exist") from None
        raise
    return info, (time.monotonic() - started) * 1000


def state_of(name: str, info: Mapping[str, Any], round_trip_ms: float) -> StreamState:
    """What `stream_info` answered."""
    state, config = info["state"], info["config"]
    server_time = info.get("ts")
    max_msg_size, max_bytes = int(config.get("max_msg_size", -1)), int(config.get("max_bytes", -1))
    return StreamState(
        name=name,
        created=info["created"],
        first_seq=state["first_seq"],
        last_seq=state["last_seq"],
        messages=state["messages"],
        bytes=state["bytes"],
        server_ms=None if server_time is None else parse_time_ns(server_time) // 1_000_000,
        round_trip_ms=round_trip_ms,
        atomic=bool(config.get("allow_atomic", False)),
        direct=bool(config.get("allow_direct", False)),
        max_msg_size=max_msg_size if max_msg_size > 0 else None,
        max_bytes=max_bytes if max_bytes > 0 else None,
        last_ns=_time_or_none(state.get("last_ts")),
    )


def _time_or_none(text: str | None) -> int | None:
    """None for the year 1 as well, which is how the server says that it does not know."""
    return time_ns if text is not None and (time_ns := parse_time_ns(text)) > 0 else None


async def ask_time(client: Client, settings: LogSettings) -> ServerTime:
    """The server's clock, also from a server before 2.10, which does not say it with a stream.

    Every server says when it made a consumer, and whoever reads the log may make one. This one is in memory, on this
    node's own stream, and deleted at once: nothing is written. Raises StreamUnavailable (also without the permission)
    or ApiError.
    """
    stream = settings.own_stream
    # A name of its own each time: for one that exists the server tells when that was made.
    name = f"harmonylite-{settings.node_id}-{uuid.uuid4().hex[:16]}"
    config = {
        "name": name,
        "deliver_policy": "new",
        "ack_policy": "none",
        "inactive_threshold": _CLOCK_CONSUMER_NS,
        "mem_storage": True,
        "num_replicas": 1,
    }
    asked = time.monotonic()
    made = await api_request(
        client, settings, f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config}
    )
    answered = time.monotonic()
    with suppress(LogError):
        await api_request(client, settings, f"CONSUMER.DELETE.{stream}.{name}", timeout_s=_CLOCK_DELETE_S)
    return ServerTime(parse_time_ns(made["created"]) // 1_000_000, (answered - asked) * 1000, answered)


async def stored_time_ns(client: Client, settings: LogSettings, state: StreamState, sequence: int) -> int | None:
    """When the server stored a message, nanoseconds since 1970; None if it holds none at `sequence`.

    Raises StreamUnavailable or ApiError.
    """
    body: dict[str, object] = {"seq": sequence}
    if not state.direct:
        # The answer holds the message in base64: one near the maximum size does not pass a leaf connection.
        try:
            answer = await api_request(client, settings, f"STREAM.MSG.GET.{state.name}", body)
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        return parse_time_ns(answer["message"]["time"])
    subject = f"{settings.api_prefix}.DIRECT.GET.{state.name}"
    data = json.dumps(body).encode()
    message = await api_message(client, subject, data, timeout_s=settings.api_timeout_s)
    headers = message.headers or {}
    if "Nats-Time-Stamp" in headers:
        return parse_time_ns(headers["Nats-Time-Stamp"])
    if headers.get("Status") == "404":
        return None
    raise ApiError(f"DIRECT.GET.{state.name}", int(headers.get("Status", 0)), 0, "no time in the answer")
