"""What the parts need of the configuration, in their own terms."""

from __future__ import annotations

from harmonylite import clock
from harmonylite.config import Config, identity
from harmonylite.db.database import ReplicaSettings
from harmonylite.stream.log import LogSettings
from harmonylite.stream.provision import STREAMS_SHARE
from harmonylite.stream.server import BundledServer
from harmonylite.stream.server_config import store_limit

# How far ahead of the stream's time a version may be before it is bounded (docs/rules.md, Clocks).
TOLERANCE_MS = 60_000
DAY_MS = 86_400_000


def replica_settings(config: Config) -> ReplicaSettings:
    return ReplicaSettings(
        node_id=config.node_id,
        publish=config.publish,
        include=config.tables.include,
        exclude=config.tables.exclude,
        group_rows=config.scan_max_changes,
        max_transaction_bytes=config.max_transaction_bytes,
        tolerance_ms=TOLERANCE_MS,
        tombstone_retention_ms=round(config.tombstone_retention * DAY_MS),
        boot_id=clock.boot_id(),
        machine_id=identity.machine_hash(),
    )


def log_settings(config: Config, server: BundledServer | None) -> LogSettings:
    """server: the bundled one, None with an external NATS."""
    plan = server.plan if server else None
    return LogSettings(
        node_id=config.node_id,
        subject_prefix=config.nats.subject_prefix,
        stream_prefix=config.nats.stream_prefix,
        shards=config.replication_log.shards,
        replicas=config.replication_log.replicas,
        domain=plan.domain if plan else config.nats.domain or None,
        compress=config.replication_log.compress,
        max_bytes=_stream_bytes(config) if plan is not None and plan.jetstream else -1,
        # Not in a cluster, whose servers differ, nor with a file of the operator, which may say how large the store is.
        owns_store=plan is not None and plan.shape in ("alone", "hub") and not config.nats.server_config,
        update_existing=config.replication_log.update_existing,
    )


def _stream_bytes(config: Config) -> int:
    """A stream discards its oldest messages before the server's store is full: then it would refuse new ones."""
    store = store_limit(config.data_dir, config.nats.max_store)
    return int(store * STREAMS_SHARE / config.replication_log.shards)
