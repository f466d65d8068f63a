"""A group as bytes: by table and by column.

    byte 0   format (1)
    byte 1   flags; bit 0: the rest is one zstd frame that states its content size
    rest     msgpack array: the head, then every column (see `columns`)

    head     map: p publisher, n number, t list of tables
    table    map: t name, k key's column names, c column names,
             r how many columns hold the rows: one for each of c, then five for their stamps,
             d how many columns hold the deleted keys: one for each of k, then five for their stamps

Tables take their columns from the array in order. To let the format grow, fields that this version does not know are
ignored, and so are columns beyond those it expects. What older versions may not miss takes another format number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import zstandard

from harmonylite.model import Group, Row, Stamp, TableChanges
from harmonylite.wire.columns import decode_column, decode_integers, encode_column
from harmonylite.wire.values import (
    MAX_INTEGER,
    NotReadableHereError,
    WireError,
    array_header,
    from_msgpack,
    to_msgpack,
)

FORMAT = 1
DEFAULT_MAX_BYTES = 1024 * 1024 * 1024

_COMPRESSED = 1
_PREFIX_PLAIN = bytes((FORMAT, 0))
_PREFIX_COMPRESSED = bytes((FORMAT, _COMPRESSED))

# Below this zstd gains little (a row or two: no repetition yet) and costs as much time as all the rest.
_COMPRESS_FROM_BYTES = 256
# A zstd block has one table of symbol frequencies; columns that share a block spoil each other's. Ending the block
# with the column makes the whole 6 to 20 % smaller. A block costs some 2 us and 10 bytes, so small columns share.
_BLOCK_BYTES = 500

_STAMP_FIELDS = len(Stamp._fields)
_new_stamp = partial(tuple.__new__, Stamp)  # Stamp._make without a Python frame per row


def encode_group(group: Group, *, compress: bool) -> bytes:
    """`group` as bytes, compressed if that makes them fewer.

    Raises WireError if rows, columns and stamps do not fit together or a value is not a SQLite value.
    """
    columns: list[bytes] = []
    tables = [_encode_table(changes, columns) for changes in group.tables]
    head = to_msgpack({"p": group.publisher, "n": group.number, "t": tables})
    chunks = [array_header(1 + len(columns)), head, *columns]
    size = sum(map(len, chunks))
    if compress and size >= _COMPRESS_FROM_BYTES:
        compressed = _compress(chunks, size)
        if len(compressed) < size:
            return _PREFIX_COMPRESSED + compressed
    return b"".join((_PREFIX_PLAIN, *chunks))


def decode_group(data: bytes | memoryview, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Group:
    """The group in `data`; rows and keys are tuples.

    `max_bytes` bounds the size after decompression, and the number of values. Raises NotReadableHereError if `data`
    is of a format this version does not know, or the memory does not suffice; WireError, and nothing else, if it is
    not a group, or is larger.
    """
    try:
        body = from_msgpack(_decompress(memoryview(data), max_bytes))
        if type(body) is not list or not body or type(body[0]) is not dict:
            raise WireError("the message has no head")
        return _Decoder(body[1:], max_bytes).group(body[0])
    except MemoryError:
        raise NotReadableHereError("the message holds more than this machine's memory") from None


def _encode_table(changes: TableChanges, columns: list[bytes]) -> dict[str, Any]:
    """The table's map; its columns are appended to `columns`."""
    name, key = changes.table, frozenset(changes.key)
    table: dict[str, Any] = {"t": name, "k": list(changes.key), "c": list(changes.columns)}
    for field, names, rows, stamps in (
        ("r", changes.columns, changes.rows, changes.row_stamps),
        ("d", changes.key, changes.deleted, changes.deleted_stamps),
    ):
        if len(rows) != len(stamps):
            raise WireError(f"{name}: {len(rows)} rows but {len(stamps)} stamps")
        if not rows:
            continue
        table[field] = len(names) + _STAMP_FIELDS
        for column_name, column in zip(names, _transpose(name, rows, len(names)), strict=True):
            columns.append(to_msgpack(encode_column(column, key=column_name in key)))
        columns.extend(
            to_msgpack(encode_column(column, key=False)) for column in _transpose(name, stamps, _STAMP_FIELDS)
        )
    return table


def _transpose(table: str, rows: Sequence[tuple[Any, ...]], width: int) -> list[tuple[Any, ...]]:
    try:
        columns = list(zip(*rows, strict=True))
    except ValueError:
        raise WireError(f"{table}: rows of different length") from None
    if len(columns) != width:
        raise WireError(f"{table}: rows have {len(columns)} values for {width} columns")
    return columns


def _compress(chunks: Iterable[bytes], size: int) -> bytes:
    frame = _zstd.compressor.compressobj(size=size)
    compressed: list[bytes] = []
    block = 0
    for chunk in chunks:
        compressed.append(frame.compress(chunk))
        block += len(chunk)
        if block >= _BLOCK_BYTES:
            compressed.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            block = 0
    compressed.append(frame.flush())
    return b"".join(compressed)


def _decompress(data: memoryview, max_bytes: int) -> memoryview | bytes:
    if len(data) < 2:
        raise WireError("the message is empty")
    if not data[0]:
        raise WireError("the message has format 0, which is none")
    if data[0] != FORMAT:
        raise NotReadableHereError(
            f"message format {data[0]} is unknown, this version reads {FORMAT}: upgrade harmonylite"
        )
    if data[1] & ~_COMPRESSED:
        raise NotReadableHereError(f"message flags {data[1]:#x} are unknown: upgrade harmonylite")
    body = data[2:]
    if not data[1]:
        _check_size(len(body), max_bytes)
        return body
    try:
        size = zstandard.frame_content_size(body)
        if size < 0:
            raise WireError("the compressed message does not state its size")
        _check_size(size, max_bytes)
        return _zstd.decompressor.decompress(body)
    except zstandard.ZstdError as error:
        raise WireError(f"the message cannot be decompressed: {error}") from error


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise WireError(f"the message holds {size} bytes or values, more than the limit of {max_bytes}")


class _Decoder:
    """Takes the columns of one message, in order."""

    def __init__(self, columns: list[object], max_values: int) -> None:
        self._columns = columns
        self._taken = 0
        self._max_values = max_values
        self._values = 0

    def group(self, head: dict[str, Any]) -> Group:
        publisher, number = _field_id(head, "p"), _field_id(head, "n")
        return Group(publisher, number, tuple(map(self._table, _field_list(head, "t"))))

    def _table(self, table: object) -> TableChanges:
        if type(table) is not dict:
            raise WireError("a table is not a map")
        name = table.get("t")
        if type(name) is not str:
            raise WireError("a table has no name")
        key, columns = _field_names(table, "k"), _field_names(table, "c")
        if not key or not set(key) <= set(columns):
            raise WireError(f"{name}: the key is not among the columns")
        rows, row_stamps = self._rows(name, table.get("r", 0), len(columns), columns.index(key[0]))
        deleted, deleted_stamps = self._rows(name, table.get("d", 0), len(key), 0)
        return TableChanges(name, key, columns, rows, row_stamps, deleted, deleted_stamps)

    def _rows(self, name: str, taken: object, width: int, first: int) -> tuple[list[Row], list[Stamp]]:
        """The rows in the next `taken` columns, and their stamps. Column `first`, a key's, tells how many there are."""
        if taken == 0:
            return [], []
        if type(taken) is not int or taken < width + _STAMP_FIELDS:
            raise WireError(f"{name}: {taken!r} columns cannot hold {width} names and a version")
        columns = self._columns[self._taken : self._taken + taken]
        self._taken += taken
        if len(columns) != taken:
            raise WireError(f"{name}: {len(columns)} of {taken} columns are there")
        key_values = decode_column(columns[first], None)
        rows = len(key_values)
        # A column sent once costs no bytes on the wire, but 8 bytes a row here.
        self._values += rows * (width + _STAMP_FIELDS)
        _check_size(self._values, self._max_values)
        values = [key_values if i == first else decode_column(column, rows) for i, column in enumerate(columns[:width])]
        stamps = [decode_integers(column, rows) for column in columns[width : width + _STAMP_FIELDS]]
        return list(zip(*values, strict=True)), list(map(_new_stamp, zip(*stamps, strict=True)))


def _field_list(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if type(value) is not list:
        raise WireError(f"field {name!r} is not a list")
    return value


def _field_names(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    names = _field_list(fields, name)
    if set(map(type, names)) - {str} or len(set(names)) != len(names):
        raise WireError(f"field {name!r} is not a list of different names")
    return tuple(names)


def _field_id(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise WireError(f"field {name!r} is not an id")
    return value


class _Zstd(threading.local):
    """One compressor and decompressor per thread: they are not thread-safe, and dear to make (100 KB and more)."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()
