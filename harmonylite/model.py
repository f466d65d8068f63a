"""The vocabulary that `db`, `wire` and `stream` share: versions, groups of changes, stream positions.

Nothing here knows SQL, NATS or encodings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class RawText:
    """A TEXT value whose bytes are not valid UTF-8. SQLite stores such text; Python's str cannot hold it.

    Not a subclass of bytes: where it is forgotten, binding it fails, instead of storing a BLOB.
    """

    data: bytes

    def __bytes__(self) -> bytes:
        return self.data


# One SQLite value: INTEGER, REAL, TEXT, BLOB (bytes), NULL, or TEXT that is not UTF-8.
Value = int | float | str | bytes | RawText | None
Row = tuple[Value, ...]


class Version(NamedTuple):
    """The order of all writes to one row: tuples compare as last writer wins does.

    ts: milliseconds since 1970 (UTC); node: the id of the node where the write was made (its *origin*);
    rank: 0 for a write, 1 for the tombstone of a row that lost a unique clash, which beats the very row it buries.
    """

    ts: int
    node: int
    rank: int = 0


class Stamp(NamedTuple):
    """A row's version, with the version its writer had seen before (`base`; (0, 0): none).

    A receiver whose own version is newer than `base` knows that the two writes were concurrent (I10).
    """

    ts: int
    node: int
    rank: int
    base_ts: int
    base_node: int


UNVERSIONED = Version(0, 0, 0)


@dataclass(frozen=True, slots=True)
class TableChanges:
    """What a group says of one table. `rows[i]` has one value per column in `columns`, stamped `row_stamps[i]`.

    `key` names the primary key's columns in key order; every one of them is in `columns`. `deleted[i]` holds only
    a key, in the order of `key`.
    """

    table: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Sequence[Row] = ()
    row_stamps: Sequence[Stamp] = ()
    deleted: Sequence[Row] = ()
    deleted_stamps: Sequence[Stamp] = ()

    def __len__(self) -> int:
        return len(self.rows) + len(self.deleted)

    def row_keys(self) -> list[Row]:
        """The key of each of `rows`, in the order of `key`."""
        positions = [self.columns.index(name) for name in self.key]
        if len(positions) == 1:
            return list(map(itemgetter(slice(positions[0], positions[0] + 1)), self.rows))
        return list(map(itemgetter(*positions), self.rows))


@dataclass(frozen=True, slots=True)
class Group:
    """Whole transactions of one publisher, as one unit: it is applied in one SQLite transaction.

    `number` grows with every group that a publisher makes, also over restarts.
    """

    publisher: int
    number: int
    tables: tuple[TableChanges, ...]

    def __len__(self) -> int:
        return sum(len(changes) for changes in self.tables)


@dataclass(frozen=True, slots=True)
class ReceivedGroup:
    """A group as the stream delivered it. `stored_ms`: the stream's own time of (the last part of) the message."""

    group: Group
    sequence: int
    stored_ms: int


@dataclass(frozen=True, slots=True)
class Unread:
    """What it takes to read a message later. stored_ms: the stream's time of it; publisher: the node that may have
    sent it; joined: the parts are joined already, so that the data is a group's bytes, not a message."""

    stored_ms: int
    publisher: int
    joined: bool


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A message that is not a group this version can read; it is kept, counted and passed.

    unread: another version may read it, so that what it says is missing here; None: damaged or foreign bytes, which
    no version can ever read.
    """

    sequence: int
    data: bytes
    error: str
    unread: Unread | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream was applied: everything up to and including `sequence` has taken effect here.

    `created` (the stream's creation time, RFC 3339) and `stored_ns` (the stream's time of the message at
    `sequence`, nanoseconds since 1970; 0 when unknown) tell whether it is still the same log.
    """

    stream: str
    created: str
    sequence: int
    stored_ns: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one read of a stream yields: complete groups and bad messages in stream order, and the position after."""

    position: Position
    groups: Sequence[ReceivedGroup] = field(default_factory=tuple)
    undecodable: Sequence[Undecodable] = field(default_factory=tuple)
