"""Whether the places that snapshots are kept in serve this node, for `doctor`: each is asked what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harmonylite.cli.checks import Check, writable
from harmonylite.cli.command import Failure, counted, duration
from harmonylite.cli.snapshot_store import connected, no_client
from harmonylite.config import Config
from harmonylite.config.model import SnapshotNats
from harmonylite.observe.control import ControlError
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores import open_store
from harmonylite.snapshot.stores.base import StoreError, StoreUnavailable
from harmonylite.snapshot.stores.s3 import S3Limits
from harmonylite.wiring import log_settings

CONNECT_S, API_TIMEOUT_S = 5.0, 3.0
# The child's start is in it, which takes seconds on a small device.
S3_LIMITS = S3Limits(connect_s=5.0, read_s=10.0, attempts=2, patience_s=30.0)
# A store with many snapshots over a slow link is not read to its end.
LIST_S = 60.0
_GET_BOTO3 = "apt install python3-boto3, or in a virtual environment pip install boto3"
_AWAY = "replication goes on; until it answers no snapshot can be stored there, or fetched"


def checks(config: Config) -> Iterator[Check]:
    """One line for the store, one for its mirror."""
    snapshot = config.snapshot
    if not snapshot.enabled:
        yield Check("snapshots", "warn", "switched off: a node that was offline for long cannot catch up")
        return
    yield _place("snapshots", config, snapshot.store)
    if snapshot.mirror:
        yield _place("mirror", config, snapshot.mirror)


def _place(name: str, config: Config, kind: str) -> Check:
    if kind == "s3" and importlib.util.find_spec("boto3") is None:
        return Check(name, "fail", "S3 needs boto3", _GET_BOTO3)
    if kind == "file" and not ((folder := Path(config.snapshot.file.path)).is_dir() and writable(folder)):
        return Check(name, "fail", f"{folder} is not a directory that this user may write", "create it")
    try:
        manifests = asyncio.run(_list(config, kind))
    except asyncio.TimeoutError:
        return Check(name, "warn", f"{_where(config, kind)} did not list all it has within {LIST_S:g} s", _AWAY)
    except (StoreUnavailable, Failure, ControlError) as error:
        return Check(name, "warn", str(error), _AWAY)
    except StoreError as error:
        return Check(name, "fail", str(error))
    return Check(name, "ok", f"{_where(config, kind)} {_holds(manifests)}")


async def _list(config: Config, kind: str) -> list[Manifest]:
    """What that store alone holds, newest first. Raises StoreError, Failure, ControlError, asyncio.TimeoutError."""
    alone = replace(config, snapshot=replace(config.snapshot, store=kind, mirror=""))
    settings = replace(log_settings(config, None), api_timeout_s=API_TIMEOUT_S)
    provider = no_client
    async with contextlib.AsyncExitStack() as stack:
        if kind == "nats":
            connection, domain = await stack.enter_async_context(connected(config, CONNECT_S))
            settings = replace(settings, domain=domain)
            provider = lambda: connection.client  # noqa: E731 - a property
        store = open_store(alone, provider, settings, limits=S3_LIMITS)
        stack.push_async_callback(store.close)
        return await asyncio.wait_for(store.list(), LIST_S)


def _where(config: Config, kind: str) -> str:
    snapshot = config.snapshot
    if kind == "s3":
        return f"S3 bucket {snapshot.s3.bucket} at {snapshot.s3.endpoint or 'AWS'}"
    if kind == "file":
        return f"the folder {snapshot.file.path}"
    return f"bucket {snapshot.nats.bucket or SnapshotNats().bucket} in NATS"


def _holds(manifests: list[Manifest]) -> str:
    if not manifests:
        return "answers, and holds no snapshot yet"
    newest = manifests[0]
    age = duration(time.time() - newest.created_ms / 1000)
    return f"holds {counted(len(manifests), 'snapshot')}, the newest {age} old, by node {newest.node_id}"
