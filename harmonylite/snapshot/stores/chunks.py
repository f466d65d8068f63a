"""A snapshot as chunks in a JetStream stream: what is asked of the server, and what its answers mean.

One message per chunk, each with a subject of its own, of which the stream keeps the last: so a chunk that is sent
again replaces itself, those that are missing can be told, and reading needs no consumer.

    <stream>.upload.<id>              an upload is under way, or a removal; the first message of a snapshot
    <stream>.chunk.<id>.<piece>.<n>   128 KiB of the object; PIECE_CHUNKS of them are a piece
    <stream>.manifest.<id>            the last message of a snapshot
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client

from harmonylite.snapshot.stores.base import StoreError, StoreFull, StoreRefused, StoreUnavailable
from harmonylite.stream.bucket import ClientProvider
from harmonylite.stream.log import (
    STREAM_NOT_FOUND,
    ApiError,
    LogError,
    LogSettings,
    StreamMissing,
    StreamUnavailable,
    api_message,
    api_request,
    ask_time,
    parse_time_ns,
    raise_error,
)
from harmonylite.stream.provision import bound_to_set

log = logging.getLogger(__name__)

# The same in every version: it is what a chunk's number stands for.
CHUNK_BYTES = 128 * 1024
# The server lists the subjects of one piece at a time: the answer stays well below the maximum payload.
PIECE_CHUNKS = 256

# Error codes: https://github.com/nats-io/nats-server/blob/main/server/errors.json
_FULL = (10023, 10047, 10077)  # insufficient resources, insufficient storage, maximum bytes exceeded
# A direct get may be answered by a replica that has not caught up.
_LAGGING_REPLICA_WAITS_S = (0.0, 0.1, 0.5)


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of the stream. stored_ms: the server's time, milliseconds since 1970."""

    data: bytes
    stored_ms: int


@dataclass(frozen=True, slots=True)
class ChunkName:
    """Where one chunk of a snapshot is. index: from 0 in the whole object."""

    snapshot_id: str
    index: int

    @property
    def piece(self) -> int:
        return self.index // PIECE_CHUNKS

    @property
    def tail(self) -> str:
        """Its subject without the stream's name."""
        return f"chunk.{self.snapshot_id}.{self.piece}.{self.index % PIECE_CHUNKS}"


class ChunkStream:
    """The stream, through whichever client is connected. Methods raise StoreUnavailable, StoreRefused or StoreFull."""

    def __init__(
        self, provider: ClientProvider, settings: LogSettings, name: str, *, replicas: int, max_bytes: int
    ) -> None:
        """max_bytes: of the stream, -1 for no bound of its own."""
        self._provider = provider
        self._settings = settings
        self._name = name
        self._replicas = replicas
        self._max_bytes = max_bytes
        self._direct = True
        self._bounded = False

    async def ensure(self) -> None:
        """Make the stream if it is missing."""
        if await self.exists():
            return
        config = {
            "name": self._name,
            "subjects": [f"{self._name}.>"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "max_bytes": self._max_bytes,
            "num_replicas": self._replicas,
            "allow_direct": True,
        }
        try:
            await self._api(f"STREAM.CREATE.{self._name}", config)
            log.info("snapshot store created", extra={"fields": {"stream": self._name, "replicas": self._replicas}})
        except StoreError as error:
            if not await self.exists():  # another node may have made it since
                raise type(error)(
                    f"stream {self._name} for snapshots does not exist and could not be created: {error}"
                ) from None
        await self.exists()

    async def exists(self) -> bool:
        """Is there a stream?"""
        return await self._info({}) is not None

    async def now_ms(self) -> int | None:
        """The server's clock; None if it is from before 2.10 and this node may not ask it, or there is no stream."""
        info = await self._info({})
        if info is None:
            return None
        if "ts" in info:
            return parse_time_ns(info["ts"]) // 1_000_000
        try:
            return (await ask_time(self._client(), self._settings)).now_ms()
        except LogError:
            return None

    async def names(self, pattern: str) -> set[str]:
        """What stands for the wildcards of `pattern` (`manifest.*`), for each message that there is."""
        prefix = f"{self._name}.{pattern.partition('*')[0]}"
        info = await self._info({"subjects_filter": f"{self._name}.{pattern}"})
        subjects: Mapping[str, int] = {} if info is None else info["state"].get("subjects") or {}
        return {subject.removeprefix(prefix) for subject in subjects}

    async def chunks_of_piece(self, snapshot_id: str, piece: int) -> set[int]:
        """The indexes, in the whole object, of the chunks that are stored of one piece."""
        names = await self.names(f"chunk.{snapshot_id}.{piece}.*")
        return {piece * PIECE_CHUNKS + int(name) for name in names}

    async def put(self, tail: str, data: bytes) -> None:
        """Store one message; the one before it under the same subject goes."""
        client = self._client()
        if len(data) > client.max_payload:
            raise StoreRefused(
                f"max_payload of the NATS server is {client.max_payload} bytes: snapshots need at least {CHUNK_BYTES}"
            )
        subject = f"{self._name}.{tail}"
        headers = {"Nats-Expected-Stream": self._name}
        try:
            message = await api_message(client, subject, data, timeout_s=self._settings.api_timeout_s, headers=headers)
            raise_error(f"a message for {subject}", json.loads(message.data))
        except LogError as error:
            raise self._explain(error) from None

    async def get(self, tail: str) -> bytes | None:
        """The message of a subject; None if there is none."""
        if self._direct:
            for wait_s in _LAGGING_REPLICA_WAITS_S:
                await asyncio.sleep(wait_s)
                data = await self._direct_get(tail)
                if data is not None:
                    return data
        stored = await self.last(tail)
        return None if stored is None else stored.data

    async def last(self, tail: str) -> Stored | None:
        """The newest message of the subjects that match `tail`, from the stream's leader."""
        body = {"last_by_subj": f"{self._name}.{tail}"}
        try:
            answer = await api_request(self._client(), self._settings, f"STREAM.MSG.GET.{self._name}", body)
        except ApiError as error:
            if error.code == 404:
                return None
            raise self._explain(error) from None
        except LogError as error:
            raise self._explain(error) from None
        message = answer["message"]
        return Stored(base64.b64decode(message.get("data") or ""), parse_time_ns(message["time"]) // 1_000_000)

    async def remove(self, tail: str) -> None:
        """Remove what matches `tail`."""
        await self._api(f"STREAM.PURGE.{self._name}", {"filter": f"{self._name}.{tail}"})

    async def _direct_get(self, tail: str) -> bytes | None:
        subject = f"{self._settings.api_prefix}.DIRECT.GET.{self._name}"
        body = json.dumps({"last_by_subj": f"{self._name}.{tail}"}).encode()
        try:
            message = await api_message(self._client(), subject, body, timeout_s=self._settings.api_timeout_s)
        except LogError as error:
            raise self._explain(error) from None
        headers = message.headers or {}
        if "Nats-Time-Stamp" in headers:
            return message.data
        if headers.get("Status") == "404":
            return None
        raise StoreUnavailable(f"stream {self._name} gave no message but status {headers.get('Status')}")

    async def _info(self, body: Mapping[str, object]) -> dict[str, Any] | None:
        """None if there is no stream."""
        try:
            info = await api_request(self._client(), self._settings, f"STREAM.INFO.{self._name}", body)
        except ApiError as error:
            if error.err_code == STREAM_NOT_FOUND:
                return None
            raise self._explain(error) from None
        except LogError as error:
            raise self._explain(error) from None
        self._direct = bool(info["config"].get("allow_direct", False))
        if not self._bounded:
            self._bounded = True
            await self._bound(info["config"])
        return info

    async def _bound(self, config: Mapping[str, Any]) -> None:
        """Put the stream's size right, if we know how large its server's store is: the log must not lose its room."""
        wanted = bound_to_set(self._settings, self._max_bytes, config)
        if wanted is None:
            return
        fields: dict[str, object] = {"stream": self._name, "max_bytes": wanted}
        try:
            await self._api(f"STREAM.UPDATE.{self._name}", {**config, "max_bytes": wanted})
            log.info("snapshot store bounded", extra={"fields": fields})
        except StoreError as error:
            fields["error"] = str(error)
            log.warning("snapshot store could not be bounded, used as it is", extra={"fields": fields})

    async def _api(self, request: str, body: Mapping[str, object]) -> dict[str, Any]:
        try:
            return await api_request(self._client(), self._settings, request, body)
        except LogError as error:
            raise self._explain(error) from None

    def _client(self) -> Client:
        try:
            return self._provider()
        except nats.errors.ConnectionClosedError:
            raise StoreUnavailable("not connected to NATS, where snapshots are kept") from None

    def _explain(self, error: LogError) -> StoreError:
        if isinstance(error, StreamUnavailable):
            return StoreUnavailable(str(error))
        if isinstance(error, StreamMissing):
            return StoreRefused(str(error))
        if isinstance(error, ApiError):
            if error.err_code in _FULL:
                return StoreFull(
                    f"no room for snapshots in stream {self._name} ({error}): "
                    "lower [snapshot] retain, or raise [nats] max_store"
                )
            if error.code >= 500:
                return StoreUnavailable(str(error))
        return StoreRefused(str(error))
