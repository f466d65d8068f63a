"""Groups as they are handed to the stream: encoded, with what has to be known of them."""

from __future__ import annotations

from dataclasses import dataclass

from harmonylite import wire
from harmonylite.db.held import is_held
from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.replica import newest_ms


@dataclass(frozen=True, slots=True)
class Packed:
    """A group, encoded. newest_ms: its newest version; through, torn: see OutgoingGroup; lo, hi: the batches that it is
    of, or a part of; tables: what it is of."""

    number: int
    payload: bytes
    rows: int
    newest_ms: int
    through: int
    torn: bool
    lo: int
    hi: int
    tables: tuple[str, ...] = ()

    @property
    def is_held(self) -> bool:
        """Whether it is a held batch that is tried again, or a part of one (db/held.py)."""
        return is_held(self.hi)


def pack(group: OutgoingGroup, *, compress: bool) -> Packed:
    return Packed(
        number=group.group.number,
        payload=wire.encode_group(group.group, compress=compress),
        rows=len(group.group),
        newest_ms=newest_ms(group.group),
        through=group.through,
        torn=group.torn,
        lo=group.span.lo,
        hi=group.span.hi,
        tables=tuple(changes.table for changes in group.group.tables),
    )
