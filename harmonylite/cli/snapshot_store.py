"""`snapshot list` and `snapshot restore`: a store as a command uses it, without the daemon where that is possible."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from harmonylite.cli.command import Failure, duration, print_json, print_line, print_table, size, warn
from harmonylite.cli.screen import Screen
from harmonylite.config import Config
from harmonylite.db.copy import adopt_copy, clean_copy, remove_database
from harmonylite.observe import control
from harmonylite.observe.control import ControlUnavailable
from harmonylite.observe.log import rfc3339
from harmonylite.snapshot.choice import USELESS
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import describe
from harmonylite.snapshot.stores import open_store
from harmonylite.snapshot.stores.base import SnapshotStore, StoreError, StoreUnavailable
from harmonylite.snapshot.workfiles import SnapshotFailed, WorkFiles, unpack_download
from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.tasks import undisturbed
from harmonylite.wiring import TOLERANCE_MS, log_settings

T = TypeVar("T")

CONNECT_S = 10.0


def show(arguments: argparse.Namespace, config: Config) -> int:
    """`snapshot list`."""

    async def ask() -> list[Manifest]:
        async with _opened(config, mirror=arguments.mirror) as store:
            return await store.list()

    manifests = _asked(ask)
    if arguments.json:
        print_json([describe(manifest) for manifest in manifests])
        return 0
    if not manifests:
        print_line("the store holds no snapshot yet")
        return 0
    now_ms = time.time() * 1000
    lines = [
        (
            manifest.id,
            rfc3339(manifest.created_ms / 1000),
            duration(max(0.0, (now_ms - manifest.created_ms) / 1000)),
            str(manifest.node_id),
            size(manifest.stored_size),
            size(manifest.size),
        )
        for manifest in manifests
    ]
    print_table(("id", "taken at", "age", "by node", "stored", "database"), lines)
    return 0


# -- restore


def restore(arguments: argparse.Namespace, config: Config) -> int:
    """`snapshot restore`."""
    target = config.db_path if arguments.to is None else arguments.to.absolute()
    if target.exists():
        raise Failure(
            f"{target} exists and is not overwritten; name another file with --to"
            if arguments.to is not None
            else f"{target} exists: a running daemon catches up by itself; --to FILE writes a snapshot beside it"
        )
    if not target.parent.is_dir():
        raise Failure(f"{target.parent}: no such folder")
    if arguments.to is None and _daemon_runs(config):
        raise Failure(f"the daemon runs, and fetches {target} by itself; harmonylite status says how far it is")

    async def fetch() -> Manifest:
        async with _opened(config, mirror=arguments.mirror) as store:
            return await _fetch_any(store, arguments.id, target, None if arguments.to is not None else config.node_id)

    manifest = _asked(fetch)
    plain = "a plain database" if arguments.to is not None else "the database of this node"
    print_line(f"{target}: {plain}, from snapshot {manifest.id} of {rfc3339(manifest.created_ms / 1000)}")
    return 0


def _daemon_runs(config: Config) -> bool:
    try:
        control.query(config.db_path, {"command": "status"})
    except ControlUnavailable:
        return False
    return True


async def _fetch_any(store: SnapshotStore, wanted: str | None, target: Path, node_id: int | None) -> Manifest:
    """The snapshot of that id, or the newest one that is intact. node_id: whose database it becomes, None: nobody's."""
    manifests = await store.list()
    if wanted is not None:
        manifests = [manifest for manifest in manifests if manifest.id == wanted]
        if not manifests:
            raise Failure(f"the store holds no snapshot {wanted}; harmonylite snapshot list shows what there is")
    for manifest in manifests:
        try:
            await _fetch(store, manifest, target, node_id)
            return manifest
        except USELESS as error:
            warn(f"snapshot {manifest.id} is of no use: {error}")
    raise Failure("the store holds no snapshot" if not manifests else "no snapshot is intact; see the lines above")


async def _fetch(store: SnapshotStore, manifest: Manifest, target: Path, node_id: int | None) -> None:
    files = WorkFiles(target)
    packed, plain = files.download(manifest.id), files.unpacked(manifest.id)
    files.check_room(manifest)
    with Screen() as screen:
        await store.download(manifest, packed, screen.progress("fetching"))
        await unpack_download(manifest, packed, plain, screen.progress("unpacking"))
        try:
            screen.show("checking")
            if node_id is None:
                await asyncio.to_thread(clean_copy, plain)
            else:
                latest_ms = manifest.created_ms + TOLERANCE_MS
                await asyncio.to_thread(adopt_copy, plain, node_id, latest_ms=latest_ms)
            os.link(plain, target)
        except FileExistsError:
            raise Failure(f"{target} was made by somebody else meanwhile, and is not overwritten") from None
        finally:
            remove_database(plain)
            remove_database(packed)


# -- the store


def _asked(question: Callable[[], Awaitable[T]]) -> T:
    try:

        async def ask() -> T:
            return await question()

        return asyncio.run(ask())
    except StoreUnavailable as error:
        raise Failure(f"{error}; try again later") from None
    except (StoreError, SnapshotFailed) as error:
        raise Failure(str(error)) from None
    except OSError as error:
        raise Failure(f"{error.filename or 'file'}: {error.strerror or error}") from None


@contextlib.asynccontextmanager
async def _opened(config: Config, *, mirror: bool) -> AsyncIterator[SnapshotStore]:
    """The store, or its mirror: if that is asked for, or if the store is in a NATS that cannot be reached."""
    if mirror and not config.snapshot.mirror:
        raise Failure("there is no mirror ([snapshot] mirror is not set)")
    async with contextlib.AsyncExitStack() as stack:
        settings = log_settings(config, None)
        store: SnapshotStore | None = None
        if config.snapshot.store == "nats" and not mirror:
            try:
                connection, domain = await stack.enter_async_context(connected(config))
                settings = dataclasses.replace(settings, domain=domain)
                store = open_store(config, lambda: connection.client, settings)
            except Failure as failure:
                if not config.snapshot.mirror:
                    raise
                warn(f"{failure}; meanwhile the mirror is read")
                mirror = True
        if store is None:
            if mirror:
                alone = dataclasses.replace(config.snapshot, store=config.snapshot.mirror, mirror="")
                config = dataclasses.replace(config, snapshot=alone)
            store = open_store(config, no_client, settings)
        try:
            yield store
        finally:
            await store.close()


def no_client() -> Any:
    """The provider of stores that are not in NATS."""
    raise StoreError("this store needs no NATS")


@contextlib.asynccontextmanager
async def connected(config: Config, patience_s: float = CONNECT_S) -> AsyncIterator[tuple[Connection, str | None]]:
    """A connection to NATS of our own, and the JetStream domain. Raises Failure, ControlError."""
    if config.external:
        urls, domain = config.nats.urls, config.nats.domain or None
    else:
        try:
            answer = control.query(config.db_path, {"command": "snapshot-nats"})
        except ControlUnavailable:
            raise Failure("the snapshots are in the NATS server that the daemon runs: start the daemon") from None
        urls, domain = (answer["url"],), answer["domain"]
    # What a daemon logs of its connection is not news here; what matters comes as an error.
    logging.getLogger("harmonylite.stream").setLevel(logging.CRITICAL)
    connection = Connection(ClientSettings.from_config(config), lambda: urls)
    await connection.start()
    try:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(undisturbed(connection.wait_connected()), patience_s)
        if not connection.connected:
            raise Failure(f"NATS cannot be reached: {connection.last_error or 'no answer'}")
        yield connection, domain
    finally:
        await connection.close()
