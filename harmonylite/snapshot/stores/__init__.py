"""Where snapshots are kept: in JetStream, in S3, in a folder; one of them may have a mirror."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harmonylite import clock
from harmonylite.config.model import Config, Snapshot, SnapshotNats
from harmonylite.snapshot.stores.base import SnapshotStore
from harmonylite.snapshot.stores.chunks import ChunkStream
from harmonylite.snapshot.stores.directory import DirectoryStore
from harmonylite.snapshot.stores.mirror import MirroredStore
from harmonylite.snapshot.stores.nats import NatsStore
from harmonylite.snapshot.stores.own import OwnSnapshots
from harmonylite.snapshot.stores.s3 import DEFAULT_LIMITS, S3Limits, S3Store
from harmonylite.stream.bucket import ClientProvider
from harmonylite.stream.log import LogSettings
from harmonylite.stream.provision import SNAPSHOTS_SHARE, STREAMS_SHARE


def open_store(
    config: Config,
    provider: ClientProvider,
    settings: LogSettings,
    listed: Callable[[bool], None] = lambda from_mirror: None,
    now_ms: Callable[[], int] = clock.wall_ms,
    limits: S3Limits = DEFAULT_LIMITS,
) -> SnapshotStore:
    """The store of `[snapshot] store`, with its mirror; nothing is asked of it yet.

    provider: the present NATS client, such as `lambda: connection.client`; only the store "nats" uses it, and
    `settings` (for the domain, and for how much of the server's disk it may fill). listed, now_ms: see
    MirroredStore. limits: of S3.
    """
    snapshot = config.snapshot
    first = _open(snapshot.store, snapshot, provider, settings, limits)
    if not snapshot.mirror:
        return first
    second = _open(snapshot.mirror, snapshot, provider, settings, limits)
    return MirroredStore(first, second, retain=snapshot.retain, listed=listed, now_ms=now_ms)


# The setting that names the place, by the kind of store.
_PLACES = {"s3": "[snapshot.s3] path", "file": "[snapshot.file] path", "nats": "[snapshot.nats] bucket"}


def _open(
    kind: str, snapshot: Snapshot, provider: ClientProvider, settings: LogSettings, limits: S3Limits
) -> SnapshotStore:
    place = _place(kind, snapshot, provider, settings, limits)
    return OwnSnapshots(place, settings.stream_prefix, _PLACES[kind])


def _place(
    kind: str, snapshot: Snapshot, provider: ClientProvider, settings: LogSettings, limits: S3Limits
) -> SnapshotStore:
    if kind == "s3":
        return S3Store(snapshot.s3, limits)
    if kind == "file":
        return DirectoryStore(Path(snapshot.file.path))
    max_bytes = int(settings.max_bytes * settings.shards / STREAMS_SHARE * SNAPSHOTS_SHARE)
    bucket = snapshot.nats.bucket or SnapshotNats().bucket
    stream = ChunkStream(
        provider, settings, bucket, replicas=snapshot.nats.replicas, max_bytes=max_bytes if max_bytes > 0 else -1
    )
    return NatsStore(stream)
