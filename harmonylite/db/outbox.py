"""Pending rows as groups of whole transactions, read from one consistent view of the database.

The view must be one in which every change log is empty: only then is no row newer than its version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from sys import getsizeof
from typing import cast

import apsw

from harmonylite.db import tables
from harmonylite.db.capture import key_columns, key_match
from harmonylite.db.held import is_held, reach
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import integer, quote, rows, version_table
from harmonylite.model import Group, RawText, Row, Stamp, TableChanges, Value

# Rows are handed on in chunks of this many at the most.
CHUNK_ROWS = 500

_DATABASE_BYTES = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"

_STAMP = "v.ts, v.node, v.rank, v.base_ts, v.base_node"
_STAMP_WIDTH = 5
_stamp_of = itemgetter(slice(_STAMP_WIDTH))
_values_of = itemgetter(slice(_STAMP_WIDTH, None))


@dataclass(frozen=True, slots=True)
class OutgoingGroup:
    """A group to publish. Once it and all before it are acknowledged, batches up to `through` are published.

    torn: a transaction was larger than `max_transaction_bytes` and had to be cut (logged and counted); span: the
    batches that it is of, or a part of.
    """

    group: Group
    through: int
    span: Span
    torn: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """Batches lo..hi that go into one group. cuts: the last batches of the parts it may be cut into, ascending."""

    lo: int
    hi: int
    cuts: tuple[int, ...] = ()

    def halves(self) -> Iterator[Span]:
        """The span in two, which may be cut again."""
        middle = len(self.cuts) // 2
        first, second = self.cuts[:middle], self.cuts[middle:]
        yield Span(self.lo, first[-1], first)
        yield Span(first[-1] + 1, self.hi, second)


@dataclass(slots=True)
class _Part:
    rows: list[Row] = field(default_factory=list)
    row_stamps: list[Stamp] = field(default_factory=list)
    deleted: list[Row] = field(default_factory=list)
    deleted_stamps: list[Stamp] = field(default_factory=list)


class Outbox:
    """Reads one table after the other; knows nothing of connections or transactions, which the caller has.

    group_rows: a group is closed once it holds so many; group_bytes: it holds no more than that if it can be cut
    between transactions, 0 for no such limit; max_bytes: it never holds more, a transaction is cut for that. Bytes are
    those of the values in memory. apart: spans whose batches are groups by themselves although they are joined. All
    four may change between two calls of `groups`.
    """

    def __init__(
        self, schema: Schema, node_id: int, *, numbers: Iterator[int], group_rows: int, max_bytes: int
    ) -> None:
        self._node_id = node_id
        self.group_rows = group_rows
        self.group_bytes = 0
        self.max_bytes = max_bytes
        self.apart: tuple[tuple[int, int], ...] = ()
        self._readers = tuple(_Reader(table) for table in schema.tables.values())
        self._numbers = numbers

    def groups(self, connection: apsw.Connection, after: int) -> Iterator[OutgoingGroup]:
        """What is pending in the connection's view of batches after `after`, oldest first: held ones (held.py), each as
        a group of its own, or all others."""
        readers = [reader for reader in self._readers if reader.has_pending(connection, after)]
        for span in self._spans(connection, readers, after):
            yield from self._read(connection, readers, span)

    def _spans(self, connection: apsw.Connection, readers: Sequence[_Reader], after: int) -> Iterator[Span]:
        """Cut the pending batches into groups: about `group_rows` rows each, never between joined batches."""
        sizes: dict[int, int] = {}
        for reader in readers:
            for batch, number in rows(connection, reader.sizes, (after, reach(after))):
                sizes[batch] = sizes.get(batch, 0) + number
        joins = rows(connection, f"SELECT lo, hi FROM {tables.JOIN} WHERE hi > ? ORDER BY lo", (after,))
        lo = hi = total = joined_to = 0
        cuts: list[int] = []
        for batch in sorted(sizes):
            alone = self._is_alone(batch)
            if lo and alone:
                yield Span(lo, hi, (*cuts, hi))
                lo, total, cuts = 0, 0, []
            if alone:
                yield Span(batch, batch, (batch,))
                continue
            if lo and batch > joined_to:
                cuts.append(hi)
                if total >= self.group_rows:
                    yield Span(lo, hi, tuple(cuts))
                    lo, total, cuts = 0, 0, []
            lo, hi, total = lo or batch, batch, total + sizes[batch]
            joined_to = max([joined_to, *(high for low, high in joins if low <= batch <= high)])
        if lo:
            yield Span(lo, hi, (*cuts, hi))

    def _is_alone(self, batch: int) -> bool:
        return is_held(batch) or any(lo <= batch <= hi for lo, hi in self.apart)

    def _read(self, connection: apsw.Connection, readers: Sequence[_Reader], span: Span) -> Iterator[OutgoingGroup]:
        """One group, or several if the span is larger than `group_bytes`: cut between batches where that is possible;
        a joined batch that is larger than `max_bytes` is torn, and only its last group completes it."""
        parts: dict[str, tuple[_Reader, _Part]] = {}
        size = 0
        least = min(self.group_bytes or self.max_bytes, self.max_bytes)
        # A database smaller than the limit holds no larger group: nothing to measure.
        limit = least if integer(connection, _DATABASE_BYTES) > least else None
        for reader in readers:
            for live, chunk, chunk_size in reader.chunks(connection, span, limit):
                if limit and size and size + chunk_size > limit and len(span.cuts) > 1:
                    for half in span.halves():
                        yield from self._read(connection, readers, half)
                    return
                if limit and size and size + chunk_size > self.max_bytes:
                    yield OutgoingGroup(self._group(parts), span.lo - 1, span, torn=True)
                    parts, size = {}, 0
                size += chunk_size
                taken = parts.setdefault(reader.table.name, (reader, _Part()))[1]
                # Plain tuples serve as stamps: making half a million Stamps a second costs a tenth of a core.
                (taken.rows if live else taken.deleted).extend(map(_values_of, chunk))
                (taken.row_stamps if live else taken.deleted_stamps).extend(cast("map[Stamp]", map(_stamp_of, chunk)))
        yield OutgoingGroup(self._group(parts), span.hi, span)

    def _group(self, parts: dict[str, tuple[_Reader, _Part]]) -> Group:
        changes = tuple(
            TableChanges(
                table=reader.table.name,
                key=reader.table.key_names,
                columns=reader.table.column_names,
                rows=part.rows,
                row_stamps=part.row_stamps,
                deleted=part.deleted,
                deleted_stamps=part.deleted_stamps,
            )
            for reader, part in parts.values()
        )
        return Group(self._node_id, next(self._numbers), changes)


class _Reader:
    """The statements that read one table's pending rows."""

    def __init__(self, table: Table) -> None:
        self.table = table
        version = version_table(table.name)
        keys = ", ".join(f"v.{name}" for name in key_columns(table).split(", "))
        names = [quote(name) for name in table.column_names]
        span = "v.batch BETWEEN ? AND ?"
        self._pending = f"SELECT 1 FROM {version} WHERE batch > ? AND batch < ? LIMIT 1"
        self.sizes = f"SELECT batch, count(*) FROM {version} WHERE batch > ? AND batch < ? GROUP BY batch"
        live = f"FROM {version} AS v CROSS JOIN {quote(table.name)} AS r ON {key_match(table, 'v', 'r')}"
        plain = ", ".join(f"r.{name}" for name in names)
        self._live = f"SELECT {_STAMP}, {plain} {live} WHERE {span} AND v.deleted = 0"
        typed = ", ".join(typed_sql(f"r.{name}") for name in names)
        self._live_typed = f"SELECT {_STAMP}, {typed} {live} WHERE {span} AND v.deleted = 0"
        gone = f"FROM {version} AS v WHERE {span} AND v.deleted = 1"
        self._deleted = f"SELECT {_STAMP}, {keys} {gone}"
        self._deleted_typed = f"SELECT {_STAMP}, {typed_keys_sql(table, 'v.')} {gone}"

    def has_pending(self, connection: apsw.Connection, after: int) -> bool:
        return any(True for _ in connection.execute(self._pending, (after, reach(after))))

    def chunks(
        self, connection: apsw.Connection, span: Span, limit: int | None
    ) -> Iterator[tuple[bool, list[Row], int]]:
        """(live, rows with the stamp in front, their bytes): up to CHUNK_ROWS rows at a time, and with a limit no
        more than a quarter of it, or one row. Without a limit nothing is measured."""
        for live, plain, typed in (
            (False, self._deleted, self._deleted_typed),
            (True, self._live, self._live_typed),
        ):
            found = _rows(connection, plain, typed, (span.lo, span.hi), _STAMP_WIDTH)
            if limit is None:
                while chunk := list(islice(found, CHUNK_ROWS)):
                    yield live, chunk, 0
            else:
                for chunk, size in _measured(found, limit // 4):
                    yield live, chunk, size


def _measured(found: Iterator[Row], limit: int) -> Iterator[tuple[list[Row], int]]:
    chunk: list[Row] = []
    size = 0
    for row in found:
        chunk.append(row)
        size += sum(map(getsizeof, row))
        if size > limit or len(chunk) == CHUNK_ROWS:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _rows(
    connection: apsw.Connection, plain: str, typed: str, bindings: Sequence[object], untyped: int
) -> Iterator[Row]:
    """Rows of `plain`; from where a TEXT is not UTF-8, those of `typed`, whose first `untyped` columns are plain."""
    done = 0
    try:
        for row in connection.execute(plain, bindings):
            yield row
            done += 1
    except UnicodeDecodeError:
        for row in islice(connection.execute(typed, bindings), done, None):
            yield decode_typed(row, untyped)


def typed_sql(expression: str) -> str:
    """A value and a flag that it is TEXT, sent as bytes because apsw refuses text that is not UTF-8."""
    return (
        f"CASE typeof({expression}) WHEN 'text' THEN CAST({expression} AS BLOB) ELSE {expression} END,"
        f" typeof({expression}) = 'text'"
    )


def typed_keys_sql(table: Table, prefix: str = "") -> str:
    """`typed_sql` of k0, k1, ..: the key's columns in one of our tables."""
    return ", ".join(typed_sql(f"{prefix}{name}") for name in key_columns(table).split(", "))


def decode_typed(row: Row, untyped: int = 0) -> Row:
    """Undo `typed_sql`: RawText where the bytes are not UTF-8, str where they are."""
    values: list[Value] = list(row[:untyped])
    for value, is_text in zip(row[untyped::2], row[untyped + 1 :: 2], strict=True):
        values.append(_text(value) if is_text and isinstance(value, bytes) else value)
    return tuple(values)


def _text(data: bytes) -> Value:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return RawText(data)
