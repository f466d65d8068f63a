"""Groups of changes to bytes and back, and messages' parts. Knows neither SQL nor NATS.

`values`: single SQLite values, keys and rows (what our tables store); `columns`: many values of one column;
`groups`: whole groups; `parts`: a group's bytes cut into messages no larger than the stream takes.
"""

from harmonylite.wire.groups import FORMAT, decode_group, encode_group
from harmonylite.wire.parts import DEFAULT_MAX_OPEN_BYTES, HEADER_BYTES, Joiner, Part, parse_part, split
from harmonylite.wire.values import MAX_INTEGER, NotReadableHereError, WireError, pack, unpack

__all__ = [
    "DEFAULT_MAX_OPEN_BYTES",
    "FORMAT",
    "HEADER_BYTES",
    "MAX_INTEGER",
    "Joiner",
    "NotReadableHereError",
    "Part",
    "WireError",
    "decode_group",
    "encode_group",
    "pack",
    "parse_part",
    "split",
    "unpack",
]
