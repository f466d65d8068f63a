"""Messages that this version could not read and another may: kept, counted, and read again after an upgrade.

What they say is missing here, so this node's database is no snapshot until they have taken effect, or until the
snapshot of a node that could read them was merged. Versions compare: that they come late does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import apsw

from harmonylite import __version__, wire
from harmonylite.db import sql, tables
from harmonylite.db.context import Context
from harmonylite.db.versions import NO_CORRECTION, Correction
from harmonylite.model import Group, Position, Undecodable, Unread

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

log = logging.getLogger(__name__)

# The version that has tried all of them.
_READ_WITH = "read_with"

_COLUMNS = "stream, created, sequence, publisher, joined, data, error, stored_ms, recorded_ms"
_KEY = "(stream, created, sequence)"

# (stream, its creation time, sequence)
Key = tuple[str, str, int]
_BEFORE_ALL: Key = ("", "", -1)


@dataclass(frozen=True, slots=True)
class Kept:
    """One message. publisher, joined, data, stored_ms: see `model.Unread`; recorded_ms: when it came here."""

    stream: str
    created: str
    sequence: int
    publisher: int
    joined: bool
    data: bytes
    error: str
    stored_ms: int
    recorded_ms: int

    @property
    def key(self) -> Key:
        return self.stream, self.created, self.sequence


class Size(NamedTuple):
    """How many messages, and the bytes of their data."""

    messages: int = 0
    bytes: int = 0

    def __neg__(self) -> Size:
        return Size(-self.messages, -self.bytes)


def size(connection: apsw.Connection, where: str = "true", bindings: sql.Bindings = ()) -> Size:
    found = sql.rows(
        connection, f"SELECT count(*), ifnull(sum(length(data)), 0) FROM {tables.UNREAD} WHERE {where}", bindings
    )
    return Size(*found[0])


def first_ms(connection: apsw.Connection) -> int | None:
    """When the stream stored the first of them; None if there is none."""
    first: int | None = sql.scalar(connection, f"SELECT min(stored_ms) FROM {tables.UNREAD}")
    return first


def load(connection: apsw.Connection, *, table: str = tables.UNREAD) -> Iterator[Kept]:
    """All of them, in the streams' order, one at a time. table: where they stand."""
    last = _BEFORE_ALL
    while (kept := _after(connection, last, table)) is not None:
        last = kept.key
        yield kept


def _after(connection: apsw.Connection, last: Key, table: str = tables.UNREAD) -> Kept | None:
    """The one that follows, in the streams' order."""
    query = f"SELECT {_COLUMNS} FROM {table} WHERE {_KEY} > (?, ?, ?) ORDER BY stream, created, sequence LIMIT 1"
    for stream, created, sequence, publisher, joined, *rest in sql.rows(connection, query, last):
        return Kept(stream, created, sequence, publisher, bool(joined), *rest)
    return None


def keep(writer: apsw.Connection, position: Position, message: Undecodable, unread: Unread, now_ms: int) -> Size:
    """Inside a transaction. position: that of the delivery in which the message came. By how much more is kept now."""
    kept = Kept(
        position.stream,
        position.created,
        message.sequence,
        unread.publisher,
        unread.joined,
        message.data,
        message.error,
        unread.stored_ms,
        now_ms,
    )
    before = size(writer, f"{_KEY} = (?, ?, ?)", kept.key)
    _insert(writer, kept)
    return Size(1 - before.messages, len(kept.data) - before.bytes)


def tell(position: Position, message: Undecodable, more: int, state: tables.State) -> None:
    """Say so when there are twice as many as when it was said last: there may be millions. more: how many came with
    this one; state: with them."""
    if more and not state.unread & (state.unread - 1):
        log.error(
            "message of a newer version cannot be read; it is kept until this node is upgraded",
            extra={
                "fields": {
                    "stream": position.stream,
                    "sequence": message.sequence,
                    "error": message.error,
                    "messages": state.unread,
                    "bytes": state.unread_bytes,
                }
            },
        )


def _insert(writer: apsw.Connection, kept: Kept) -> None:
    # A log that lost its end gives the same numbers out again; what it lost, its publisher sends again.
    writer.execute(
        f"INSERT OR REPLACE INTO {tables.UNREAD} ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*kept.key, kept.publisher, int(kept.joined), kept.data, kept.error, kept.stored_ms, kept.recorded_ms),
    )


def _remove(writer: apsw.Connection, keys: Iterable[Key]) -> Size:
    """How much that was."""
    messages = data = 0
    for key in keys:
        removed = size(writer, f"{_KEY} = (?, ?, ?)", key)
        writer.execute(f"DELETE FROM {tables.UNREAD} WHERE {_KEY} = (?, ?, ?)", key)
        messages, data = messages + removed.messages, data + removed.bytes
    return Size(messages, data)


def _pass_over(writer: apsw.Connection, keys: Sequence[Key]) -> Size:
    """Nobody waits for them any more; they stay where messages are that nobody can read. How much that was."""
    for key in keys:
        writer.execute(
            f"INSERT OR IGNORE INTO {tables.UNDECODABLE} (stream, sequence, data, error, recorded_ms)"
            f" SELECT stream, sequence, data, error, recorded_ms FROM {tables.UNREAD} WHERE {_KEY} = (?, ?, ?)",
            key,
        )
    return _remove(writer, keys)


def _keys(writer: apsw.Connection) -> list[Key]:
    return [
        (row[0], row[1], row[2]) for row in sql.rows(writer, f"SELECT stream, created, sequence FROM {tables.UNREAD}")
    ]


def arrive(writer: apsw.Connection, positions: Sequence[Position], theirs: Sequence[Kept]) -> None:
    """Inside the transaction that ends a merge, before the positions move: what the snapshot's node had read is here
    now; what it could not read, and this node has not read itself, waits here too. theirs: the snapshot's."""
    ends = {position.stream: position for position in positions}
    waiting = {kept.key for kept in theirs}
    _remove(writer, [key for key in _keys(writer) if key not in waiting and _is_before(key, ends)])
    here = {position.stream: position for position in tables.load_positions(writer)}
    for kept in theirs:
        if not _is_before(kept.key, here):
            _insert(writer, kept)
            tables.set_meta(writer, _READ_WITH, "")


def _is_before(key: Key, positions: dict[str, Position]) -> bool:
    """Whether a message was read at these positions; not if its stream is another one by now, which tells nothing."""
    stream, created, sequence = key
    position = positions.get(stream)
    return position is not None and created == position.created and sequence <= position.sequence


def give_up(writer: apsw.Connection) -> None:
    """Inside a transaction: what is here is to count without them."""
    _pass_over(writer, _keys(writer))


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """A group in several messages, of which only some were kept. first: the sequence of its first one."""

    stream: str
    created: str
    first: int
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What one message turned out to be. keys: the messages that are done with it."""

    group: Group | None = None
    damage: str | None = None
    keys: tuple[Key, ...] = ()
    stored_ms: int = 0


@dataclass(slots=True)
class _Stream:
    """The parts of one stream's groups that are not complete; of each the messages, and a part without its body."""

    joiner: wire.Joiner = field(default_factory=wire.Joiner)
    keys: dict[tuple[int, object], list[Key]] = field(default_factory=dict)
    parts: dict[tuple[int, object], wire.Part] = field(default_factory=dict)


class Rereading:
    """Tries all of them with this version, in short transactions. All methods are the writer's; each raises
    apsw.BusyError, apsw.FullError, apsw.IOError with nothing changed: call it again.

        rereading = Rereading(replica)
        while rereading.step():
            ...
        for group in rereading.open_groups():
            rereading.go_back(group, ...)
        rereading.finish()
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._last = _BEFORE_ALL
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._found: _Found | None = None
        self.applied = 0

    @staticmethod
    def due(replica: Replica) -> bool:
        """Whether there are any that this version has not tried; takes no lock."""
        return bool(replica.completeness.unread_messages) and tables.get_meta(replica.writer, _READ_WITH) != __version__

    def step(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> bool:
        """One message. False: all were tried, `finish` is due. bound_ms, correction: as in Replica.apply."""
        if self._found is None:
            kept = _after(self._replica.writer, self._last)
            if kept is None:
                return False
            self._last = kept.key
            self._found = self._read(kept)
        found = self._found
        if found.keys:
            self._replica.judge(lambda context: self._do(found, context), bound_ms, correction)
            self.applied += found.group is not None
        self._found = None
        return True

    def _do(self, found: _Found, context: Context) -> None:
        replica = self._replica
        if found.group is not None:
            replica.take(found.group, context, found.stored_ms + replica.tolerance_ms)
            gone = _remove(replica.writer, found.keys)
        else:
            log.error("message is damaged; it is passed over", extra={"fields": {"error": found.damage}})
            gone = _pass_over(replica.writer, found.keys)
        replica.completeness.unread_changed(-gone)

    def _read(self, kept: Kept) -> _Found:
        keys: tuple[Key, ...] = (kept.key,)
        try:
            payload: bytes | None = kept.data
            if not kept.joined:
                payload, keys = self._join(kept)
                if payload is None:
                    return _Found()
            assert payload is not None
            return _Found(wire.decode_group(payload), None, keys, kept.stored_ms)
        except wire.NotReadableHereError:
            return _Found()
        except wire.WireError as error:
            return _Found(None, str(error), keys)

    def _join(self, kept: Kept) -> tuple[bytes | None, tuple[Key, ...]]:
        part = wire.parse_part(kept.data)
        if part.publisher != kept.publisher:
            raise wire.WireError(f"node {part.publisher} may not publish as node {kept.publisher}")
        stream = self._streams.setdefault((kept.stream, kept.created), _Stream())
        group = part.publisher, part.payload_id
        stream.keys.setdefault(group, []).append(kept.key)
        stream.parts[group] = replace(part, body=memoryview(b""))
        payload = stream.joiner.add(part, kept.sequence, kept.stored_ms)
        if payload is None:
            return None, ()
        del stream.parts[group]
        return payload, tuple(stream.keys.pop(group))

    def open_groups(self) -> list[OpenGroup]:
        """Groups that wait for messages which were not kept here."""
        return [
            OpenGroup(name, created, keys[0][2], tuple(keys))
            for (name, created), stream in self._streams.items()
            for group, keys in stream.keys.items()
            if stream.joiner.is_open(stream.parts[group])
        ]

    def go_back(self, group: OpenGroup, position: Position) -> None:
        """Reading goes on at `position`, just before an open group: its messages come again."""
        with self._replica.transaction():
            tables.save_position(self._replica.writer, position)
            self._replica.completeness.unread_changed(-_remove(self._replica.writer, group.keys))

    def give_up(self, group: OpenGroup) -> None:
        """The other messages of an open group are gone for good."""
        with self._replica.transaction():
            self._replica.completeness.unread_changed(-_pass_over(self._replica.writer, group.keys))

    def finish(self) -> None:
        """This version has tried all. Messages of groups that their publisher gave up, and copies, go."""
        replica = self._replica
        with replica.transaction():
            for stream in self._streams.values():
                for group, keys in stream.keys.items():
                    if not stream.joiner.is_open(stream.parts[group]):
                        replica.completeness.unread_changed(-_remove(replica.writer, keys))
            tables.set_meta(replica.writer, _READ_WITH, __version__)
