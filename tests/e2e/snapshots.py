"""What tests with snapshots share: the places where they are kept, logs that drop what nobody has read, the ledger."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats

from harmonylite.observe.control import query
from tests.e2e import writers
from tests.e2e.cluster import Cluster, Node, Settings, eventually, merged
from tests.e2e.writers import WRITE, Write, WriterProcess, now_ms, verify
from tests.snapshot.seaweed import BUCKET, Seaweed

STREAM = "harmonylite-changes-1"
# The stream gets 60 % of it, the snapshots 30 %.
STORE = 4 << 20
MORE_THAN_THE_STREAM_MB = 4.0

# Beside the rows that the writers' ledgers know: few rows, much to carry.
BULK = "CREATE TABLE bulk (id INTEGER PRIMARY KEY, data BLOB NOT NULL);"
SCHEMA = writers.SCHEMA + BULK


# -- where snapshots are


class Place(ABC):
    """A store, as the nodes are told of it, and as a bad disk leaves it."""

    @property
    @abstractmethod
    def settings(self) -> Settings:
        """What the nodes' configuration says."""

    @abstractmethod
    def damage(self, hub: Node, snapshot_id: str, how: str) -> None:
        """how: "flip" a bit of it, "cut" off a half, "remove" it; its manifest stays."""


@dataclass(frozen=True)
class NatsPlace(Place):
    """Beside the log, in the hub's server."""

    @property
    def settings(self) -> Settings:
        return {}

    def damage(self, hub: Node, snapshot_id: str, how: str) -> None:
        """The server has a checksum of each message: what was flipped on its disk is not there any more."""
        where = query(hub.db, {"command": "snapshot-nats"})
        asyncio.run(self._purge(where, snapshot_id, ">" if how == "remove" else "0.0"))

    async def _purge(self, where: dict[str, Any], snapshot_id: str, chunks: str) -> None:
        client = await nats.connect(where["url"])
        jetstream = client.jetstream(domain=where["domain"] or None)
        names = [str(info.config.name) for info in await jetstream.streams_info()]
        [stream] = [name for name in names if "snapshot" in name]
        before = (await jetstream.stream_info(stream)).state.messages
        await jetstream.purge_stream(stream, subject=f"{stream}.chunk.{snapshot_id}.{chunks}")
        assert (await jetstream.stream_info(stream)).state.messages < before
        await client.close()


@dataclass(frozen=True)
class S3Place(Place):
    """A folder in a real service's bucket."""

    service: Seaweed
    folder: str

    @property
    def settings(self) -> Settings:
        return self.through(self.service.port)

    def through(self, port: int, **snapshot: object) -> Settings:
        """By another way; snapshot: instead of `store = "s3"`."""
        return {
            "snapshot": snapshot or {"store": "s3"},
            "snapshot.s3": {
                "endpoint": f"127.0.0.1:{port}",
                "bucket": BUCKET,
                "path": self.folder,
                "access_key": "admin-key",
                "secret": "admin-secret",
            },
        }

    def stored(self) -> list[str]:
        return self.service.keys(self.folder)

    def damage(self, hub: Node, snapshot_id: str, how: str) -> None:
        client = self.service.client
        where = {"Bucket": BUCKET, "Key": f"{self.folder}/{snapshot_id}.sqlite.zst"}
        content = client.get_object(**where)["Body"].read()
        client.delete_object(**where)
        if how != "remove":
            client.put_object(**where, Body=_flipped(content) if how == "flip" else content[: len(content) // 2])


@dataclass(frozen=True)
class FolderPlace(Place):
    """A folder that all nodes have mounted; the small log does not bound it."""

    folder: Path

    @property
    def settings(self) -> Settings:
        self.folder.mkdir(exist_ok=True)
        return {"snapshot": {"store": "file"}, "snapshot.file": {"path": str(self.folder)}}

    def damage(self, hub: Node, snapshot_id: str, how: str) -> None:
        [file] = [path for path in self.folder.glob(f"{snapshot_id}*") if path.suffix != ".json"]
        if how == "flip":
            file.write_bytes(_flipped(file.read_bytes()))
        elif how == "cut":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def shared_folder(tmp_path: Path) -> Settings:
    """The snapshots of all nodes in a folder, which the small store does not bound."""
    return FolderPlace(tmp_path / "share").settings


# -- logs that drop what nobody has read


def small_store(cluster: Cluster, size: int = STORE) -> list[Node]:
    """The hub's stream holds little. All nodes, the hub first."""
    hub = cluster.nodes[1]
    hub.configure(merged(hub.settings, {"nats": {"max_store": size}}))
    return list(cluster.nodes.values())


def churn(node: Node, mbytes: float, *, row_bytes: int = 10_000) -> None:
    """Twenty rows, written again and again until the stream has taken so much that does not compress."""
    with node.open_db() as connection:
        for _ in range(round(mbytes * 1e6 / (20 * row_bytes))):
            before = published(node)
            connection.execute("BEGIN IMMEDIATE")
            rows = [(number, os.urandom(row_bytes)) for number in range(20)]
            connection.executemany("INSERT OR REPLACE INTO bulk VALUES (?, ?)", rows)
            connection.execute("COMMIT")
            wait_published(node, before + len(rows))


def wait_published(node: Node, rows: int) -> None:
    eventually(lambda: published(node) >= rows, 30, f"{rows} rows are published", pause_s=0.01)


def published(node: Node) -> int:
    return int((node.status() or {"published_rows": 0})["published_rows"])


def many_rows(node: Node, rows: int, *, size: int = 40, first: int = 1000, together: int = 10_000) -> None:
    """Into `bulk`, in transactions of `together` that each fit into a small stream. Each is published before the next:
    a daemon that is behind takes several as one, which may not fit."""
    with node.open_db() as connection:
        for start in range(first, first + rows, together):
            before, numbers = published(node), range(start, min(start + together, first + rows))
            connection.execute("BEGIN IMMEDIATE")
            new = ((number, os.urandom(size)) for number in numbers)
            connection.executemany("INSERT OR REPLACE INTO bulk VALUES (?, ?)", new)
            connection.execute("COMMIT")
            wait_published(node, before + len(numbers))


def lose_store(hub: Node) -> None:
    """Kill the hub and throw its streams away."""
    hub.kill()
    while hub.signal_server(signal.SIGKILL):
        time.sleep(0.02)
    shutil.rmtree(hub.store)


def lose_database(node: Node) -> None:
    """The daemon has ended; work files beside the database go with it."""
    for path in node.folder.glob("*app.db*"):
        path.unlink()


# -- snapshots


def save(node: Node, *, force: bool = False, timeout_s: float = 60) -> str:
    """Take a snapshot now; its id."""
    query(node.db, {"command": "snapshot-save", "force": force})
    answer: dict[str, Any] = {}

    def done() -> bool:
        answer.update(query(node.db, {"command": "snapshot-progress"}))
        return not answer["running"]

    eventually(done, timeout_s, "the snapshot is taken")
    assert "error" not in answer, answer
    return str(answer["snapshot"]["id"])


def reasons(node: Node) -> str:
    return " ".join((node.status() or {"reasons": ()})["reasons"])


def wait_caught_up(node: Node, timeout_s: float = 60, *, begun: int = 0) -> None:
    """From a snapshot, after the first `begun` characters of its log."""
    eventually(lambda: "caught up from a snapshot" in node.log_text()[begun:], timeout_s, "caught up from a snapshot")


# -- the ledger


def writers_of(nodes: Sequence[Node], pause_ms: float = 30) -> list[WriterProcess]:
    return [WriterProcess(node.db, node.node_id, seed=node.node_id, pause_ms=pause_ms) for node in nodes]


def write(node: Node, key: str, sequence: int, payload: str = "") -> Write:
    """One write of a row that no writer knows, for the ledger."""
    return _committed(node, key, sequence, WRITE, (key, node.node_id, sequence, payload))


def delete(node: Node, key: str, sequence: int) -> Write:
    """As `write`; the row is there."""
    return _committed(node, key, sequence, "DELETE FROM item WHERE id = ?", (key,))


def _committed(node: Node, key: str, sequence: int, sql: str, bindings: Sequence[object]) -> Write:
    with node.open_db() as connection:
        connection.execute("BEGIN IMMEDIATE")
        begun = now_ms()
        assert connection.execute(sql, bindings).rowcount == 1
        connection.execute("COMMIT")
    return Write(node.node_id, sequence, key, sql.startswith("DELETE"), begun, now_ms(), f"{node.folder}, by hand")


def nothing_lost(
    cluster: Cluster, writers: Iterable[WriterProcess], by_hand: Iterable[Write] = (), timeout_s: float = 90
) -> None:
    """All nodes become identical, and every acknowledged write is there or beaten by a later one."""
    every_write_counts(cluster, [*by_hand, *(each for writer in writers for each in writer.writes())], timeout_s)


def every_write_counts(cluster: Cluster, writes: Sequence[Write], timeout_s: float = 90) -> None:
    """As `nothing_lost`."""
    cluster.wait_settled(timeout_s)
    verdict = verify(cluster.databases(), writes)
    print(verdict)
    assert not verdict.lost, "\n".join(verdict.lost[:20])
    assert not verdict.alien, "\n".join(verdict.alien[:20])
