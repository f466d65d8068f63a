"""Cutting a group's bytes into messages no larger than the stream takes, and joining them again.

Every message, also the only one of a small group, is a header and a slice of the payload. Big-endian:

    magic "HL" | header version u8 | flags u8 | publisher u64 | number u64 | part index u32 | part count u32 |
    payload length u64 | CRC-32 of the payload u32 | newest version in the group, ms since 1970, i64
"""

from __future__ import annotations

import logging
import struct
import zlib
from dataclasses import dataclass, field

from harmonylite.wire.values import NotReadableHereError, WireError

log = logging.getLogger(__name__)

_HEADER = struct.Struct(">2sBBQQIIQIq")
HEADER_BYTES = _HEADER.size
HEADER_VERSION = 1
_MAGIC = b"HL"

DEFAULT_OPEN_LIMIT_MS = 3_600_000
# The largest group, 128 MiB of values (config: max_transaction_bytes), may have twice the bytes here: publishers
# measure in memory, where a Latin-1 letter takes one byte. The rest is for versions, headers and parts.
DEFAULT_MAX_OPEN_BYTES = 272 * 1024 * 1024

# What a held part costs beside its bytes (the bytes object, its slot): many tiny parts must not escape the limit.
_PART_OVERHEAD_BYTES = 128


@dataclass(frozen=True, slots=True)
class Part:
    """One message: `body` is the slice number `index` (from 0) of `count` of a payload of `total` bytes."""

    publisher: int
    number: int
    index: int
    count: int
    total: int
    crc32: int
    max_ts: int
    body: memoryview

    @property
    def payload_id(self) -> tuple[int, int, int, int]:
        """What all parts of one payload have in common, and no other payload of that publisher."""
        return self.number, self.count, self.total, self.crc32


def split(payload: bytes, *, publisher: int, number: int, max_bytes: int, max_ts: int) -> list[bytes]:
    """`payload` as message bodies of at most `max_bytes` each, in the order in which they are to be published.

    `max_ts`: the newest version timestamp in the group, ms. Raises ValueError if `max_bytes` leaves no room beside
    the header, WireError if an id does not fit.
    """
    room = max_bytes - HEADER_BYTES
    if room < 1:
        raise ValueError(f"a message of {max_bytes} bytes has no room beside a header of {HEADER_BYTES}")
    count = max(1, -(-len(payload) // room))
    crc = zlib.crc32(payload)
    view = memoryview(payload)
    try:
        return [
            b"".join(
                (
                    _HEADER.pack(_MAGIC, HEADER_VERSION, 0, publisher, number, index, count, len(payload), crc, max_ts),
                    view[index * room : (index + 1) * room],
                )
            )
            for index in range(count)
        ]
    except struct.error as error:
        raise WireError(f"group {number} of publisher {publisher} does not fit a header: {error}") from error


def parse_part(data: bytes | memoryview) -> Part:
    """The part in `data`; its body is a view of `data`, not a copy. Raises NotReadableHereError if its header is of
    a version this one does not know, WireError if it is no part."""
    if len(data) < HEADER_BYTES or bytes(data[:2]) != _MAGIC:
        raise WireError("the message is not a part of a group")
    view = memoryview(data)
    _, version, flags, publisher, number, index, count, total, crc, max_ts = _HEADER.unpack_from(view)
    if not version:
        raise WireError("part header version 0 is none")
    if version != HEADER_VERSION or flags:
        raise NotReadableHereError(
            f"part header version {version} with flags {flags:#x} is unknown, "
            f"this version reads {HEADER_VERSION}: upgrade harmonylite"
        )
    body = view[HEADER_BYTES:]
    fits = len(body) == total if count == 1 else 0 < len(body) < total and count <= total
    if index >= count or not fits:
        raise WireError(f"part {index + 1} of {count} with {len(body)} of {total} bytes makes no sense")
    return Part(publisher, number, index, count, total, crc, max_ts, body)


# What all parts of one payload have in common, and no other payload of any publisher: its publisher, `payload_id`.
_Key = tuple[int, tuple[int, int, int, int]]


@dataclass(slots=True)
class _OpenGroup:
    count: int
    first_sequence: int
    first_stored_ms: int
    bodies: dict[int, bytes] = field(default_factory=dict)
    """What arrived, by index; of a shelved group only the indexes: all are empty."""
    body_bytes: int = 0
    shelved: bool = False

    @property
    def all_seen(self) -> bool:
        return len(self.bodies) == self.count

    @property
    def held_bytes(self) -> int:
        return 0 if self.shelved else self.body_bytes + _PART_OVERHEAD_BYTES * len(self.bodies)


class Joiner:
    """Joins the parts of one stream to payloads; holds the open groups: those of which some parts have arrived.

    A group opens with its part 0; after that its parts may come in any order, mixed with other publishers' parts.
    An open group is dropped while parts of it are missing

    - when its publisher starts or completes a group with a higher number: it gave this one up, and sends its rows
      again in another. A lower number drops nothing: a message that had timed out may be stored late, in the middle
      of a later group;
    - when a message arrives that was stored more than `open_limit_ms` after the group's first one.

    So a publisher that sends one part again because its acknowledgement is missing may do just that; one that sends
    part 0 again sends all of them.

    When more than `max_open_bytes` are held, the newest open groups are shelved: their publishers may have every
    acknowledgement, so they stay open, also when no part of them is missing any more, but without their bytes. Once
    the oldest open group is a shelved one (`must_read_again`), the reader goes back to just before it, with a new
    Joiner. That ends: from there on this group is the oldest one, which always fits, so each time at least one more
    group is behind the reader for good.
    """

    def __init__(
        self, *, open_limit_ms: int = DEFAULT_OPEN_LIMIT_MS, max_open_bytes: int = DEFAULT_MAX_OPEN_BYTES
    ) -> None:
        self._open_limit_ms = open_limit_ms
        self._max_open_bytes = max_open_bytes
        self._open: dict[_Key, _OpenGroup] = {}  # oldest first
        # By publisher: the payload completed last, and the sequence of its last part.
        self._completed: dict[int, tuple[tuple[int, int, int, int], int]] = {}
        self._open_bytes = 0
        self.dropped = 0
        """Groups that were given up before their last part came."""
        self.late = 0
        """Parts of groups that are not open: dropped before, or begun before reading started."""
        self.duplicates = 0
        """Parts that had arrived already."""

    @property
    def open_groups(self) -> int:
        """How many groups wait for more parts."""
        return len(self._open)

    @property
    def open_bytes(self) -> int:
        """Memory held for open groups."""
        return self._open_bytes

    def is_open(self, part: Part) -> bool:
        """Whether the group of a part waits for more."""
        return (part.publisher, part.payload_id) in self._open

    def first_open_sequence(self) -> int | None:
        """The sequence at which the oldest open group began: the reader's position has to stay before it."""
        return next((group.first_sequence for group in self._open.values()), None)

    @property
    def must_read_again(self) -> bool:
        """Whether reading has to start again at `first_open_sequence()`: nothing but a shelved group waits there."""
        return bool(self._open) and next(iter(self._open.values())).shelved

    def add(self, part: Part, sequence: int, stored_ms: int) -> bytes | None:
        """Take the part that the stream holds at `sequence` since `stored_ms`; the payload if it was the last one.

        Raises WireError if the parts do not make the payload they promised, or promise more than `max_open_bytes`.
        """
        self._drop_expired(stored_ms)
        if self._was_completed(part, sequence):
            self.duplicates += 1
            return None
        if part.count == 1:
            return self._complete(part, bytes(part.body), sequence)
        group = self._group_of(part, sequence, stored_ms)
        if group is None:
            self.late += 1
            return None
        if part.index in group.bodies:
            self.duplicates += 1
            return None
        if group.shelved:
            group.bodies[part.index] = b""
            return None
        group.bodies[part.index] = bytes(part.body)
        group.body_bytes += len(part.body)
        self._open_bytes += len(part.body) + _PART_OVERHEAD_BYTES
        if group.all_seen or group.body_bytes > part.total:
            self._forget((part.publisher, part.payload_id))
            return self._complete(part, b"".join(group.bodies[i] for i in sorted(group.bodies)), sequence)
        while self._open_bytes > self._max_open_bytes:
            self._shelve_newest()
        return None

    def _group_of(self, part: Part, sequence: int, stored_ms: int) -> _OpenGroup | None:
        """The open group that `part` belongs to, opened if it is part 0; None for a late part."""
        key = (part.publisher, part.payload_id)
        group = self._open.get(key)
        if group is not None or part.index > 0:
            return group
        if part.total + part.count * _PART_OVERHEAD_BYTES > self._max_open_bytes:
            raise WireError(
                f"group {part.number} of publisher {part.publisher} has {part.total} bytes in {part.count} parts, "
                f"more than the limit of {self._max_open_bytes}"
            )
        # Also one of the same number: a publisher that was restored from a backup uses its numbers again.
        self._drop_up_to(part.publisher, part.number)
        group = self._open[key] = _OpenGroup(part.count, sequence, stored_ms)
        return group

    def _was_completed(self, part: Part, sequence: int) -> bool:
        """Whether `part` is a copy of one that is in a complete group already.

        Only what is stored after the group's end can be a copy: whoever reads the stream again from an earlier
        position wants the group again.
        """
        payload_id, end = self._completed.get(part.publisher, (None, 0))
        return payload_id == part.payload_id and sequence > end

    def _complete(self, part: Part, payload: bytes, sequence: int) -> bytes:
        self._drop_up_to(part.publisher, part.number)
        if len(payload) != part.total or zlib.crc32(payload) != part.crc32:
            raise WireError(
                f"group {part.number} of publisher {part.publisher} arrived damaged: "
                f"{len(payload)} of {part.total} bytes, or a wrong checksum"
            )
        self._completed[part.publisher] = (part.payload_id, sequence)
        return payload

    def _drop_up_to(self, publisher: int, number: int) -> None:
        for key, group in list(self._open.items()):
            if key[0] == publisher and key[1][0] <= number and not group.all_seen:
                self._drop(key, reason="publisher went on to another group")

    def _drop_expired(self, stored_ms: int) -> None:
        for key, group in list(self._open.items()):
            if group.first_stored_ms >= stored_ms - self._open_limit_ms:
                return
            if not group.all_seen:
                self._drop(key, reason="no end in time")

    def _shelve_newest(self) -> None:
        """Free the newest held group's bytes: never the oldest's, since a group fits when it is held alone."""
        key, group = next(item for item in reversed(self._open.items()) if not item[1].shelved)
        self._open_bytes -= group.held_bytes
        group.bodies, group.shelved = dict.fromkeys(group.bodies, b""), True
        _log_group("too many bytes of open groups, one will be read again", key, group)

    def _drop(self, key: _Key, *, reason: str) -> None:
        group = self._forget(key)
        self.dropped += 1
        _log_group("incomplete group dropped", key, group, reason=reason)

    def _forget(self, key: _Key) -> _OpenGroup:
        group = self._open.pop(key)
        self._open_bytes -= group.held_bytes
        return group


def _log_group(event: str, key: _Key, group: _OpenGroup, **fields: str) -> None:
    publisher, (number, *_) = key
    known = {"publisher": publisher, "number": number, "sequence": group.first_sequence, "parts": len(group.bodies)}
    log.warning(event, extra={"fields": {**known, **fields}})
