"""One node for the tests of `db/`: its file, its application, its clock, its replica; and groups passed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from harmonylite import wire
from harmonylite.db import tables
from harmonylite.db.marking import Marking
from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.replica import Applied, Replica, ReplicaSettings
from harmonylite.db.sql import version_table
from harmonylite.model import Delivery, Group, Position, ReceivedGroup, Row, Stamp, TableChanges, Undecodable, Version

STREAM, CREATED = "changes-1", "2023-11-14T22:13:20Z"
# The first time that a test's clock shows: 2023-11-14T22:13:20Z.
EPOCH_MS = 1_700_000_000_000
DAY_MS = 86_400_000


class Clock:
    """Milliseconds since 1970, moved by the test alone."""

    def __init__(self, now_ms: int = EPOCH_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def tick(self, ms: int = 10) -> int:
        self.now_ms += ms
        return self.now_ms

    def show_on(self, connection: apsw.Connection) -> None:
        """Make the triggers that run on this connection see this clock."""

        def julianday(*_: Any) -> float:
            return self.now_ms / DAY_MS + 2440587.5

        connection.createscalarfunction("julianday", julianday, 1)


class Killer:
    """An exec trace that kills, with KeyboardInterrupt, before the statement of that number; it counts over all
    connections that it is set on."""

    def __init__(self, statement: int) -> None:
        self.left = statement

    def __call__(self, *_: object) -> bool:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return True


class Node:
    """`app` is the application's connection; the daemon's side is `replica`, between `start` and `stop`."""

    def __init__(self, path: Path, node_id: int, script: str = "", *, clock: Clock | None = None) -> None:
        self.path = path
        self.id = node_id
        self.clock = clock or Clock()
        self.app = self.connect()
        self.app.execute("PRAGMA journal_mode=WAL")
        self.app.execute("PRAGMA synchronous=OFF")  # quick; no test pulls the plug
        self.app.execute(script)
        self.settings: dict[str, Any] = {}
        self.replica: Replica = None  # type: ignore[assignment]
        self.received = 0

    # -- the application

    def connect(self) -> apsw.Connection:
        """Another connection of the application."""
        connection = apsw.Connection(str(self.path))
        connection.setbusytimeout(2_000)
        self.clock.show_on(connection)
        return connection

    def sql(self, sql: str, bindings: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """A statement of the application, a moment after the last one."""
        self.clock.tick()
        return self.app.execute(sql, bindings).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.app.execute("BEGIN IMMEDIATE")
        yield
        self.app.execute("COMMIT")

    # -- the daemon

    def start(self, **settings: Any) -> Node:
        self.settings |= settings
        self.replica = Replica(self.path, ReplicaSettings(node_id=self.id, **self.settings), self.clock)
        self.replica.open()
        self.clock.show_on(self.writer)
        return self

    def stop(self) -> None:
        """As the daemon stops: acknowledgements become durable."""
        self.replica.flush()
        self.replica.close()

    def crash(self) -> Node:
        """Killed: what was not committed is gone; then started again."""
        self.replica.close()
        return self.start()

    def restart(self, **settings: Any) -> Node:
        self.stop()
        return self.start(**settings)

    @property
    def writer(self) -> apsw.Connection:
        return self.replica._writer

    def absorb(self, bound_ms: int | None = None) -> int:
        total = 0
        while count := self.replica.absorb(bound_ms):
            total += count
        return total

    def collect(self) -> list[OutgoingGroup] | None:
        """What is pending, as a list; None where `Outgoing.read` says that."""
        groups = self.replica.outgoing.read()
        return None if groups is None else list(groups)

    def outgoing(self) -> list[OutgoingGroup]:
        """Everything pending, not acknowledged."""
        self.absorb()
        found = self.collect()
        # As the engine does: under the lock, where a changed schema is followed first.
        return self.replica.outgoing.read_locked(limit=1_000_000) if found is None else found

    def publish(self) -> list[Group]:
        """Everything pending, through the encoding of the wire and acknowledged."""
        sent = self.outgoing()
        for outgoing in sent:
            self.replica.outgoing.mark_published(outgoing.through)
        return [wire.decode_group(wire.encode_group(each.group, compress=True)) for each in sent]

    def start_over(self, position: Position) -> None:
        """Everything is pending again, and reading goes on at `position`."""
        marking = Marking(self.replica)
        while marking.step():
            pass
        marking.finish(position)

    def apply(self, *groups: Group, stored_ms: int | None = None, bound_ms: int | None = None) -> Applied:
        """Receive groups as the next messages of the stream; stored now, or at `stored_ms`."""
        at = self.clock.now_ms if stored_ms is None else stored_ms
        first = self.received + 1
        received = tuple(ReceivedGroup(group, first + index, at) for index, group in enumerate(groups))
        return self.deliver(received, bound_ms=bound_ms)

    def deliver(
        self,
        groups: Sequence[ReceivedGroup] = (),
        undecodable: Sequence[Undecodable] = (),
        bound_ms: int | None = None,
    ) -> Applied:
        sequences = [*(item.sequence for item in groups), *(item.sequence for item in undecodable)]
        end = max(sequences, default=self.received)
        applied = self.replica.apply(Delivery(Position(STREAM, CREATED, end, 1), groups, undecodable), bound_ms)
        self.received = end
        return applied

    # -- looking

    def query(self, sql: str, bindings: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return self.app.execute(sql, bindings).fetchall()

    def vanished(self, table: str) -> list[Row]:
        """Keys of rows that should be there and are not."""
        pieces = self.replica.unseen.look_through(self.replica.schema.tables[table])
        return [key for piece in pieces for key in piece]

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        return sorted(self.query(f'SELECT * FROM "{table}"'), key=repr)

    def version(self, table: str, *key: object) -> Version | None:
        where = " AND ".join(f"k{i} = ?" for i in range(len(key)))
        for found in self.query(f"SELECT ts, node, rank FROM {version_table(table)} WHERE {where}", key):
            return Version(*found)
        return None

    def tombstones(self, table: str) -> list[tuple[Any, ...]]:
        return self.query(f"SELECT k0 FROM {version_table(table)} WHERE deleted = 1 ORDER BY k0")

    def meta(self, name: str) -> Any:
        return next(iter(self.query(tables.META_VALUE, (name,))), (None,))[0]

    def conflicts(self) -> list[tuple[str, Any, Version, str, Any]]:
        """(table, key, loser's version, reason, row) of the conflict log, in its order."""
        sql = f"SELECT tbl, key, ts, node, rank, reason, row FROM {tables.CONFLICT} ORDER BY id"
        return [
            (tbl, tuple(wire.unpack(key)), Version(ts, node, rank), reason, wire.unpack(row) if row else None)  # type: ignore[arg-type]
            for tbl, key, ts, node, rank, reason, row in self.query(sql)
        ]

    def parked(self) -> list[tuple[str, Any, Version, str]]:
        sql = f"SELECT tbl, key, ts, node, rank, reason FROM {tables.PARKED} ORDER BY tbl, key"
        return [
            (tbl, tuple(wire.unpack(key)), Version(ts, node, rank), reason)  # type: ignore[arg-type]
            for tbl, key, ts, node, rank, reason in self.query(sql)
        ]

    def everything(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every table of the file, ours too: to see that nothing changed."""
        names = [name for (name,) in self.query("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
        return {name: self.rows(name.replace('"', '""')) for name in names}


def exchange(*nodes: Node) -> None:
    """Publish and apply, everybody's messages at everybody (their own too), until nothing is pending anywhere."""
    for _ in range(20):
        groups = [group for node in nodes for group in node.publish()]
        if not groups:
            return
        now = max(node.clock.now_ms for node in nodes)
        for node in nodes:
            node.apply(*groups, stored_ms=now)
    raise AssertionError("the nodes never come to rest")


def ours(node: Node) -> list[str]:
    """Names of our tables, indexes and triggers."""
    found = node.query("SELECT name FROM sqlite_schema WHERE name LIKE '%harmonylite%' ORDER BY name")
    return [name for (name,) in found]


def stamp(ts: int, node: int, *, base: tuple[int, int] = (0, 0), rank: int = 0) -> Stamp:
    return Stamp(ts, node, rank, *base)


def wrote(
    table: str, columns: Sequence[str], *rows: tuple[Row, Stamp], key: Sequence[str] = ("id",), number: int = 1
) -> Group:
    """A group of one table with written rows."""
    changes = TableChanges(table, tuple(key), tuple(columns), [row for row, _ in rows], [each for _, each in rows])
    return Group(rows[0][1].node, number, (changes,))


def deleted(table: str, *rows: tuple[Row, Stamp], key: Sequence[str] = ("id",), number: int = 1) -> Group:
    """A group of one table with deleted keys."""
    changes = TableChanges(
        table, tuple(key), tuple(key), deleted=[row for row, _ in rows], deleted_stamps=[each for _, each in rows]
    )
    return Group(rows[0][1].node, number, (changes,))


def written(groups: Iterable[Group], table: str) -> list[tuple[Row, Stamp]]:
    """What groups say was written in a table."""
    return [
        (tuple(row), each)
        for group in groups
        for changes in group.tables
        if changes.table == table
        for row, each in zip(changes.rows, changes.row_stamps, strict=True)
    ]


def removed(groups: Iterable[Group], table: str) -> list[Row]:
    """The keys that groups say were deleted from a table."""
    return [
        tuple(key) for group in groups for changes in group.tables if changes.table == table for key in changes.deleted
    ]
