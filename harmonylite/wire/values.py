"""SQLite values as msgpack: the storage class survives exactly.

INTEGER is a msgpack integer within 64 signed bits, REAL always a 64-bit float (infinities and -0.0 too), TEXT str,
BLOB bin, NULL nil. TEXT that is not UTF-8 has no msgpack type of its own: extension type 1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection
from typing import Any

import msgpack

from harmonylite.model import RawText

MIN_INTEGER = -(2**63)
MAX_INTEGER = 2**63 - 1

_RAW_TEXT = 1
_SCALARS = frozenset({int, float, str, bytes, RawText, type(None)})
# A packer keeps the largest buffer it ever needed; one that grew beyond this is not kept.
_KEPT_PACKER_BYTES = 4 * 1024 * 1024

# Everything msgpack raises on bad input or unpackable values; its own exceptions are subclasses of ValueError,
# except UnpackException. MemoryError: a claimed size that this machine cannot hold.
_MSGPACK_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    msgpack.exceptions.UnpackException,
)


class WireError(ValueError):
    """Bytes that are not what they should be, or a value that SQLite could not hold. One line, for the operator."""


class NotReadableHereError(WireError):
    """Nothing says that the bytes are damaged: another version, or a machine with more memory, may read them."""


def pack(value: object) -> bytes:
    """`value`, a SQLite value or nested lists, tuples and dicts (str keys) of them, as msgpack.

    Raises WireError for anything else: bool, NaN, integers beyond 64 signed bits.
    """
    try:
        _check_nested(value)
    except RecursionError:
        raise WireError("cannot pack: nested too deeply") from None
    return to_msgpack(value)


def unpack(data: bytes | memoryview) -> object:
    """What `pack` packed; tuples come back as lists. Raises WireError for anything `pack` would not have made."""
    value = from_msgpack(data)
    try:
        _check_nested(value)
    except RecursionError:
        raise WireError("cannot unpack: nested too deeply") from None
    return value


def to_msgpack(value: object) -> bytes:
    """Like `pack`, but the caller vouches for the types."""
    packer = _packers.packer
    try:
        packed: bytes = packer.pack(value)
    except _MSGPACK_ERRORS as error:
        _packers.renew()  # it may hold half of the value
        raise WireError(f"cannot pack: {error}") from error
    if len(packed) > _KEPT_PACKER_BYTES:
        _packers.renew()
    return packed


def from_msgpack(data: bytes | memoryview) -> object:
    """Like `unpack`, but values may be anything msgpack knows: the caller checks what it uses.

    Claimed lengths are held against `len(data)` by msgpack itself, and maps have str keys.
    """
    try:
        value: object = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True, ext_hook=_from_extension)
    except _MSGPACK_ERRORS as error:
        raise WireError(f"not valid msgpack: {str(error) or type(error).__name__}") from error
    return value


def array_header(length: int) -> bytes:
    """What a msgpack array of `length` packed values begins with."""
    header: bytes = _packers.packer.pack_array_header(length)
    return header


def check_values(values: Collection[object]) -> None:
    """Raise WireError if one of `values` is not a SQLite value."""
    check_types(values, set(map(type, values)))


def check_types(values: Collection[object], kinds: set[type]) -> None:
    """`check_values` for whoever knows the types in `values` already.

    Works by whole columns in C, unless a column mixes integers or floats with other types than NULL.
    """
    if not kinds <= _SCALARS:
        raise WireError(f"{_names(kinds - _SCALARS)} is not a SQLite value")
    if int in kinds:
        integers = _of_type(int, values, kinds)
        check_range(min(integers, default=0), max(integers, default=0))
    if float in kinds:
        floats = _of_type(float, values, kinds)
        # The sum is NaN if a value is, and also for inf - inf: only then look at each.
        if math.isnan(sum(floats)) and any(map(math.isnan, floats)):
            raise WireError("NaN is not a SQLite value")


def check_range(low: int, high: int) -> None:
    """Raise WireError unless `low` and `high` are 64-bit signed."""
    if low < MIN_INTEGER or high > MAX_INTEGER:
        raise WireError("integer beyond 64 bits is not a SQLite value")


def _of_type(kind: type, values: Collection[Any], kinds: set[type]) -> Collection[Any]:
    """Those of `values` that are of type `kind`; zeros may be missing."""
    if kinds == {kind}:
        return values
    if kinds == {kind, type(None)}:  # a nullable column: no Python code per value
        return list(filter(None, values))
    return [value for value in values if type(value) is kind]


def _check_nested(value: object) -> None:
    if isinstance(value, (list, tuple)) and not isinstance(value, msgpack.ExtType):
        for item in value:
            _check_nested(item)
    elif type(value) is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise WireError(f"{type(name).__name__} as a map's key")
            _check_nested(item)
    else:
        check_values((value,))


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def _to_extension(value: object) -> object:
    if isinstance(value, RawText):
        return msgpack.ExtType(_RAW_TEXT, bytes(value))
    if isinstance(value, tuple):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not a SQLite value")


def _from_extension(code: int, data: bytes) -> object:
    # A type of the future may stand in a field that this version ignores: only its use as a value is an error.
    return RawText(data) if code == _RAW_TEXT else msgpack.ExtType(code, data)


class _Packers(threading.local):
    """One packer per thread: they are not thread-safe, and making one costs more than packing a row."""

    packer: Any

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        # strict_types: else RawText, a subclass of bytes, would be packed as a BLOB.
        self.packer = msgpack.Packer(strict_types=True, use_bin_type=True, default=_to_extension)


_packers = _Packers()
