"""A key-value bucket whose keys expire, through plain requests (see `registry` for why).

A bucket is a stream `KV_<bucket>` whose subjects are `$KV.<bucket>.<key>`; keys expire by the stream's `max_age`.
https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-8.md
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client

from harmonylite.stream.log import (
    STREAM_NOT_FOUND,
    ApiError,
    LogSettings,
    StreamMissing,
    StreamUnavailable,
    api_message,
    api_request,
    parse_time_ns,
    raise_error,
)

log = logging.getLogger(__name__)

# The present client; raises nats.errors.ConnectionClosedError while there is none.
ClientProvider = Callable[[], Client]

# "The last message of this subject is another one": somebody else wrote the key (two codes, by server version).
WRONG_LAST_SEQUENCE = (10071, 10164)
_MAX_VALUE_BYTES = 8 * 1024
_NANOSECONDS = 1_000_000_000
# The server refuses a duplicate window longer than max_age, and its default is two minutes.
_DUPLICATES_NS = 100_000_000


class KeyTaken(ApiError):  # noqa: N818 - what happened
    """The key's last message is not the expected one: somebody else wrote it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The last message of a key. data: empty if it was deleted; stored_ms: server time, milliseconds since 1970."""

    data: bytes
    revision: int
    stored_ms: int


class ExpiringBucket:
    """A bucket, through whichever client is connected; it is made before its first use.

    Methods raise StreamUnavailable, StreamMissing (it is made by the next call) or ApiError.
    """

    def __init__(self, provider: ClientProvider, settings: LogSettings, name: str, *, ttl_s: float) -> None:
        self._provider = provider
        self._settings = settings
        self._name = name
        self._stream = f"KV_{name}"
        self._wanted_ttl_s = ttl_s
        self._ensured = False
        self.ttl_s = ttl_s  # how long keys live: what the bucket says, once `ensure` has asked it

    async def ensure(self) -> None:
        """Make the bucket if it is missing. Raises StreamMissing if this node may not."""
        config = await self._config()
        if config is None:
            config = await self._create()
        wanted = int(self._wanted_ttl_s * _NANOSECONDS)
        if config.get("max_age") != wanted:
            if self._settings.update_existing:
                changed = {**config, "max_age": wanted}
                await self._request(f"STREAM.UPDATE.{self._stream}", changed)
                config = changed
            else:
                fields = {"bucket": self._name, "ttl_s": config["max_age"] / _NANOSECONDS, "wanted": self._wanted_ttl_s}
                log.warning("bucket has another TTL than configured, used as it is", extra={"fields": fields})
        self.ttl_s = config["max_age"] / _NANOSECONDS or self._wanted_ttl_s
        self._ensured = True

    async def get(self, key: str) -> Entry | None:
        """A key's last message, as the stream's leader has it; None if there is none."""
        try:
            answer = await self._ask(f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": self._subject(key)})
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        message = answer["message"]
        stored_ms = parse_time_ns(message["time"]) // 1_000_000
        return Entry(base64.b64decode(message.get("data") or ""), int(message["seq"]), stored_ms)

    async def put(self, key: str, data: bytes, revision: int | None = None) -> int:
        """Write; the new revision. revision: what has to be the key's last (0: none); raises KeyTaken if it is not."""
        headers = {} if revision is None else {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        return await self._write(key, data, headers)

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Delete a key; see `put`."""
        headers = {"KV-Operation": "DEL"}
        if revision is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        await self._write(key, b"", headers)

    async def keys(self, pattern: str) -> list[str]:
        """The keys that match `pattern` (`wanted.*`), deleted ones too."""
        body = {"subjects_filter": self._subject(pattern)}
        info = await self._ask(f"STREAM.INFO.{self._stream}", body)
        prefix = self._subject("")
        return sorted(subject.removeprefix(prefix) for subject in info["state"].get("subjects") or {})

    def _subject(self, key: str) -> str:
        return f"$KV.{self._name}.{key}"

    async def _write(self, key: str, data: bytes, headers: dict[str, str]) -> int:
        if not self._ensured:
            await self.ensure()
        subject = self._subject(key)
        if self._settings.domain:
            subject = f"{self._settings.api_prefix}.{subject}"
        message = await api_message(
            self._client(), subject, data, timeout_s=self._settings.api_timeout_s, headers=headers
        )
        ack = json.loads(message.data)
        try:
            raise_error(f"key {key} of bucket {self._name}", ack)
        except ApiError as error:
            if error.err_code in WRONG_LAST_SEQUENCE:
                raise KeyTaken(f"key {key} of bucket {self._name}", error.code, error.err_code, "taken") from None
            raise
        return int(ack["seq"])

    async def _create(self) -> dict[str, Any]:
        wanted = {
            "name": self._stream,
            "subjects": [self._subject(">")],
            "retention": "limits",
            # Renewed every few seconds, worth nothing after its TTL: no reason to write to a card all day.
            "storage": "memory",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "max_msg_size": _MAX_VALUE_BYTES,
            "max_age": int(self._wanted_ttl_s * _NANOSECONDS),
            "duplicate_window": _DUPLICATES_NS,
            "num_replicas": self._settings.replicas,
            "allow_direct": True,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
        }
        failure: ApiError | StreamUnavailable | None = None
        try:
            await self._request(f"STREAM.CREATE.{self._stream}", wanted)
            log.info("bucket created", extra={"fields": {"bucket": self._name, "ttl_s": self._wanted_ttl_s}})
        except (ApiError, StreamUnavailable) as error:
            failure = error
        config = await self._config()  # another node may have made it
        if config is not None:
            return config
        if isinstance(failure, ApiError):
            raise failure
        raise StreamMissing(
            f"bucket {self._name} does not exist and this node could not create it ({failure}); "
            "let an administrator create it"
        )

    async def _config(self) -> dict[str, Any] | None:
        """None if there is no bucket."""
        try:
            info = await self._request(f"STREAM.INFO.{self._stream}", None)
        except ApiError as error:
            if error.err_code == STREAM_NOT_FOUND:
                return None
            raise
        config: dict[str, Any] = info["config"]
        return config

    async def _ask(self, request: str, body: dict[str, Any]) -> dict[str, Any]:
        if not self._ensured:
            await self.ensure()
        try:
            return await self._request(request, body)
        except ApiError as error:
            if error.err_code != STREAM_NOT_FOUND:
                raise
            self._ensured = False
            raise StreamMissing(f"bucket {self._name} does not exist any more; it is made anew") from None

    async def _request(self, request: str, body: dict[str, Any] | None) -> dict[str, Any]:
        return await api_request(self._client(), self._settings, request, body)

    def _client(self) -> Client:
        try:
            return self._provider()
        except nats.errors.ConnectionClosedError:
            raise StreamUnavailable("not connected to NATS") from None
