"""Snapshots of random bytes, and what every store must do with them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harmonylite.model import Position
from harmonylite.snapshot.manifest import Manifest, new_id
from tests.stream.logfixture import Server
from tests.stream.support import free_port

NOW_MS = 1_763_970_300_000
MIB = 1 << 20
POSITION = Position("harmonylite-changes-1", "2025-11-24T07:00:00.123456789Z", 345, 1_763_970_200_000_000_001)


def snapshot(path: Path, size: int, *, age: int = 0, node_id: int = 7) -> Manifest:
    """Write `size` random bytes to `path`; their manifest. age: seconds by which it is older than others."""
    data = os.urandom(size)
    path.write_bytes(data)
    created_ms = NOW_MS - age * 1000
    return Manifest(
        id=new_id(created_ms, node_id),
        node_id=node_id,
        version="1.2.3",
        created_ms=created_ms,
        positions=(
            Position("harmonylite-changes-1", "2026-11-24T07:45:00.123456789Z", 345, 1_763_970_200_000_000_001),
        ),
        schema="f00d",
        size=size * 3,
        stored_size=size,
        sha256=hashlib.sha256(data).hexdigest(),
        tombstones_since_ms=created_ms - 1000,
    )


def like(manifest: Manifest, *, age: int, node_id: int = 7) -> Manifest:
    """The manifest of another snapshot with the same bytes."""
    created_ms = NOW_MS - age * 1000
    return replace(manifest, id=new_id(created_ms, node_id), node_id=node_id, created_ms=created_ms)


class Recorded:
    """A progress function that remembers, and can break the transfer."""

    def __init__(self, at: int | None = None, then: Callable[[], None] | None = None) -> None:
        """then: called once, as soon as `at` bytes are done."""
        self.calls: list[tuple[int, int]] = []
        self._at, self._then = at, then

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if self._at is not None and self._then is not None and done >= self._at:
            self._at = None
            self._then()

    @property
    def first(self) -> int:
        """Where the transfer began, bytes."""
        return self.calls[0][0]

    @property
    def last(self) -> tuple[int, int]:
        return self.calls[-1]


def cluster(folder: Path) -> list[Server]:
    """Three servers, not started."""
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    return [
        Server(
            folder / str(port),
            f'server_name: s{port}\njetstream {{ store_dir: "{folder / str(port) / "store"}" }}\n'
            f'cluster {{ name: c\n  listen: "127.0.0.1:{port}"\n  routes: [ {routes} ] }}',
        )
        for port in ports
    ]


def leader_of(servers: list[Server], name: str) -> Server:
    """The server that the cluster calls `name`."""
    (found,) = [each for each in servers if f"server_name: {name}\n" in (each.folder / "server.conf").read_text()]
    return found
