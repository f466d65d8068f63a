"""The streams of the log as they are to be: made when missing, adopted when somebody else made them, bounded in size.

A stream discards its oldest messages before its server's store is full: a full store refuses new ones. Who may know how
large the store is: the node whose server it is, and the account's limits; not a leaf. So whoever makes a stream bounds
it as well as it can, and a node that knows better puts it right when it connects.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nats.aio.client import Client

from harmonylite.stream.log import (
    ApiError,
    LogSettings,
    StreamMissing,
    StreamState,
    StreamUnavailable,
    api_request,
    state_of,
    stream_info,
    stream_state,
)

log = logging.getLogger(__name__)

# The first JetStream API level (server 2.12) that knows atomic batches.
ATOMIC_API_LEVEL = 2
# How much of a store the streams and the snapshots may fill; the rest is for the registry and what a server needs to
# compact.
STREAMS_SHARE, SNAPSHOTS_SHARE = 0.6, 0.3
# The size of a store follows the free disk space: a bound is put right only when it is off by more than this.
_TOLERATED = 1.1


async def ensure_streams(client: Client, settings: LogSettings) -> tuple[StreamState, ...]:
    """Make every stream of the log that is missing, adopt those that exist; their states, by shard.

    Works without the permission to create, as long as somebody made the streams. Raises StreamUnavailable,
    StreamMissing (not there, and this node cannot make it) or ApiError (the server cannot make it like that).
    """
    return tuple([await _ensure_stream(client, settings, shard) for shard in range(1, settings.shards + 1)])


async def _ensure_stream(client: Client, settings: LogSettings, shard: int) -> StreamState:
    name = settings.stream(shard)
    wanted = _stream_config(settings, shard)
    try:
        info, round_trip_ms = await stream_info(client, settings, name)
    except StreamMissing:
        await _create(client, settings, name, wanted)
        info, round_trip_ms = await stream_info(client, settings, name)
    config = info["config"]
    changes: dict[str, object] = {}
    if differences := _differences(config, wanted):
        if settings.update_existing:
            changes.update((key, wanted[key]) for key in differences)
        else:
            fields = {"stream": name, "differences": differences}
            log.warning("stream differs from the configuration, used as it is", extra={"fields": fields})
    if (bound := bound_to_set(settings, settings.max_bytes, config)) is not None:
        changes["max_bytes"] = bound
    if changes:
        try:
            info = await api_request(client, settings, f"STREAM.UPDATE.{name}", {**config, **changes})
            log.info("stream updated", extra={"fields": {"stream": name, "changed": sorted(changes)}})
        except (ApiError, StreamUnavailable) as error:
            fields = {"stream": name, "error": str(error)}
            log.warning("stream could not be updated, used as it is", extra={"fields": fields})
    return state_of(name, info, round_trip_ms)


async def _create(client: Client, settings: LogSettings, name: str, wanted: Mapping[str, object]) -> None:
    if settings.max_bytes <= 0:
        wanted = {**wanted, "max_bytes": await _account_bound(client, settings)}
    try:
        await api_request(client, settings, f"STREAM.CREATE.{name}", wanted)
        fields = {"stream": name, "replicas": settings.replicas, "max_bytes": wanted["max_bytes"]}
        log.info("stream created", extra={"fields": fields})
    except (ApiError, StreamUnavailable) as error:
        try:  # somebody else may have made it since; a refused permission is no answer at all
            await stream_state(client, settings, name)
        except StreamMissing:
            if isinstance(error, ApiError):
                raise error from None
            raise StreamMissing(
                f"stream {name} does not exist and this node could not create it ({error}); "
                f"let an administrator create it for {wanted['subjects']}"
            ) from None
        log.info("stream was created by another node", extra={"fields": {"stream": name}})


def _stream_config(settings: LogSettings, shard: int) -> dict[str, object]:
    """What JetStream is asked for; an older server ignores what it does not know.

    No limit by count or age: a message that another node still needs must not go before space does.
    """
    return {
        "name": settings.stream(shard),
        "subjects": [settings.subjects(shard)],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_bytes": settings.max_bytes,
        "num_replicas": settings.replicas,
        "allow_direct": True,
        "allow_atomic": True,
    }


def _differences(config: Mapping[str, Any], wanted: Mapping[str, object]) -> dict[str, object]:
    """The settings in `config` that are not as wanted, except the bound, and what its server does not know."""
    level = int((config.get("metadata") or {}).get("_nats.level", 0))
    unknown = {"allow_atomic"} if level < ATOMIC_API_LEVEL else set()
    unknown.add("max_bytes")
    return {key: config.get(key) for key in wanted if key not in unknown and config.get(key) != wanted[key]}


def bound_to_set(settings: LogSettings, wanted: int, config: Mapping[str, Any]) -> int | None:
    """The `max_bytes` that a stream of this configuration should get; None to leave it. wanted: bytes, 0 or less if
    this node does not know."""
    present = int(config.get("max_bytes", -1))
    if wanted <= 0 or (present > 0 and not settings.owns_store):
        return None
    return None if wanted / _TOLERATED <= present <= wanted * _TOLERATED else wanted


async def _account_bound(client: Client, settings: LogSettings) -> int:
    """What the account's own limit leaves for one stream, bytes; -1 when it has none, or that cannot be asked."""
    try:
        account = await api_request(client, settings, "INFO")
        limit = int(account["limits"]["max_storage"])
    except (ApiError, StreamUnavailable, KeyError, TypeError, ValueError):
        return -1
    return int(limit * STREAMS_SHARE / settings.shards / settings.replicas) if limit > 0 else -1
