"""Key-value buckets beside the log, through plain requests.

A bucket is a stream `KV_<bucket>` whose subjects are `$KV.<bucket>.<key>`. The client library's own writes do not pass
a JetStream domain, where the subject is `$JS.<domain>.API.$KV...`.
https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-8.md
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
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
_WRONG_LAST_SEQUENCE = (10071, 10164)
# Bounds what one node can fill of an expiring bucket.
_EXPIRING_VALUE_BYTES = 8 * 1024
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


class Bucket:
    """A bucket, through whichever client is connected. Methods raise StreamUnavailable or ApiError."""

    def __init__(
        self, provider: ClientProvider, settings: LogSettings, name: str, config: Mapping[str, object], *, what: str
    ) -> None:
        """config: what its stream has of its own, when this node makes it; what: the bucket's purpose, for the log."""
        self._provider = provider
        self._settings = settings
        self._name = name
        self._own_config = config
        self._what = what
        self.stream = f"KV_{name}"

    async def ensure(self) -> dict[str, Any]:
        """Make the bucket if it is missing; its stream's configuration. Raises StreamMissing if this node may not."""
        return await self._config() or await self._create()

    async def get(self, key: str) -> Entry | None:
        """A key's last message, as the stream's leader has it; None if there is none."""
        try:
            answer = await self._ask(f"STREAM.MSG.GET.{self.stream}", {"last_by_subj": self._subject(key)})
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        message = answer["message"]
        stored_ms = parse_time_ns(message["time"]) // 1_000_000
        return Entry(base64.b64decode(message.get("data") or ""), int(message["seq"]), stored_ms)

    async def put(self, key: str, data: bytes, revision: int | None = None) -> int:
        """Write; the new revision. revision: what has to be the key's last (0: none); raises KeyTaken if it is not."""
        return await self._write(key, data, {}, revision)

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Delete a key; see `put`."""
        await self._write(key, b"", {"KV-Operation": "DEL"}, revision)

    async def keys(self, pattern: str) -> list[str]:
        """The keys that match `pattern` (`wanted.*`), deleted ones too."""
        body = {"subjects_filter": self._subject(pattern)}
        info = await self._ask(f"STREAM.INFO.{self.stream}", body)
        prefix = self._subject("")
        return sorted(subject.removeprefix(prefix) for subject in info["state"].get("subjects") or {})

    def _subject(self, key: str) -> str:
        return f"$KV.{self._name}.{key}"

    async def _write(self, key: str, data: bytes, headers: dict[str, str], revision: int | None) -> int:
        if revision is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
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
            if error.err_code in _WRONG_LAST_SEQUENCE:
                raise KeyTaken(f"key {key} of bucket {self._name}", error.code, error.err_code, "taken") from None
            raise
        return int(ack["seq"])

    async def _create(self) -> dict[str, Any]:
        wanted = {
            "name": self.stream,
            "subjects": [self._subject(">")],
            "retention": "limits",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "num_replicas": self._settings.replicas,
            "allow_direct": True,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            **self._own_config,
        }
        try:
            created = await self._request(f"STREAM.CREATE.{self.stream}", wanted)
        except (ApiError, StreamUnavailable) as error:
            config = await self._config()  # another node may have made it
            if config is not None:
                return config
            if isinstance(error, ApiError):
                raise error from None
            raise StreamMissing(
                f"bucket {self._name} does not exist and this node could not create it ({error}); "
                "let an administrator create it"
            ) from None
        log.info("%s created", self._what, extra={"fields": {"bucket": self._name}})
        made: dict[str, Any] = created["config"]
        return made

    async def _config(self) -> dict[str, Any] | None:
        """None if there is no bucket."""
        try:
            info = await self._request(f"STREAM.INFO.{self.stream}", None)
        except ApiError as error:
            if error.err_code == STREAM_NOT_FOUND:
                return None
            raise
        config: dict[str, Any] = info["config"]
        return config

    async def _ask(self, request: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._request(request, body)

    async def _request(self, request: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        return await api_request(self._client(), self._settings, request, body)

    def _client(self) -> Client:
        try:
            return self._provider()
        except nats.errors.ConnectionClosedError:
            raise StreamUnavailable("not connected to NATS") from None


class ExpiringBucket(Bucket):
    """A bucket whose keys expire, by its stream's `max_age`; it is made before its first use.

    Methods raise StreamMissing, too: the bucket is gone, and made by the next call.
    """

    def __init__(self, provider: ClientProvider, settings: LogSettings, name: str, *, ttl_s: float) -> None:
        self._wanted_age = int(ttl_s * _NANOSECONDS)
        config = {
            # Renewed every few seconds, worth nothing after its TTL: no reason to write to a card all day.
            "storage": "memory",
            "max_msg_size": _EXPIRING_VALUE_BYTES,
            "max_age": self._wanted_age,
            "duplicate_window": _DUPLICATES_NS,
        }
        super().__init__(provider, settings, name, config, what="bucket")
        self._wanted_ttl_s = ttl_s
        self._ensured = False
        self.ttl_s = ttl_s  # how long keys live: what the bucket says, once `ensure` has asked it

    async def ensure(self) -> dict[str, Any]:
        """Make the bucket if it is missing. Raises StreamMissing if this node may not."""
        config = await super().ensure()
        if config.get("max_age") != self._wanted_age:
            if self._settings.update_existing:
                config = {**config, "max_age": self._wanted_age}
                await self._request(f"STREAM.UPDATE.{self.stream}", config)
            else:
                fields = {"bucket": self._name, "ttl_s": config["max_age"] / _NANOSECONDS, "wanted": self._wanted_ttl_s}
                log.warning("bucket has another TTL than configured, used as it is", extra={"fields": fields})
        self.ttl_s = config["max_age"] / _NANOSECONDS or self._wanted_ttl_s
        self._ensured = True
        return config

    async def _write(self, key: str, data: bytes, headers: dict[str, str], revision: int | None) -> int:
        if not self._ensured:
            await self.ensure()
        return await super()._write(key, data, headers, revision)

    async def _ask(self, request: str, body: dict[str, Any]) -> dict[str, Any]:
        if not self._ensured:
            await self.ensure()
        try:
            return await super()._ask(request, body)
        except ApiError as error:
            if error.err_code != STREAM_NOT_FOUND:
                raise
            self._ensured = False
            raise StreamMissing(f"bucket {self._name} does not exist any more; it is made anew") from None
