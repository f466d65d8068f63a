"""What this node knows of what it has: whether changes are missing here that others have, and up to which time of the
server it had read everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from harmonylite.db import tables, unread
from harmonylite.db.database import Database
from harmonylite.model import Position


class Completeness:
    """A view of the state for all who ask for that. Methods say which connection they use."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def incomplete(self) -> str | None:
        """Any thread. See `tables.State.incomplete`."""
        return self._database.state.incomplete

    @property
    def hole(self) -> str:
        """Any thread. See `tables.State`."""
        return self._database.state.hole

    @property
    def unread_messages(self) -> int:
        """Any thread. See `tables.State`."""
        return self._database.state.unread

    @property
    def unread_bytes(self) -> int:
        """Any thread. See `tables.State`."""
        return self._database.state.unread_bytes

    @property
    def hole_ends(self) -> tuple[Position, ...]:
        """Any thread. What a snapshot has to contain of each stream for the hole to be none any more; empty if that is
        not known."""
        ends = json.loads(self._database.state.hole_ends or "[]")
        return tuple(Position(stream, created, sequence) for stream, created, sequence in ends)

    def note_hole(self, text: str, end: Position | None = None) -> None:
        """Writer. Reading is about to go on behind `end` although messages were missed: until a snapshot was merged
        that has them, or `declare_complete`."""
        ends = {each.stream: each for each in self.hole_ends}
        if end is not None:
            ends[end.stream] = end  # an earlier one of this stream lies before it
        stored = json.dumps([(each.stream, each.created, each.sequence) for each in ends.values()])
        with self._database.transaction():
            self._database.state = replace(self._database.state, hole=text, hole_ends=stored)

    def _is_filled(self, positions: Sequence[Position]) -> bool:
        """Whether a snapshot at these positions was taken behind all that was missed here; that of a stream that was
        made anew was, as its node has missed nothing. A stream that is gone counts for nothing."""
        there = {each.stream: each for each in positions}
        return all(
            (found := there.get(end.stream)) is None or found.created != end.created or found.sequence >= end.sequence
            for end in self.hole_ends
        )

    def unread_changed(self, change: unread.Size) -> None:
        """Writer, inside `transaction` or `judge`. What is kept of unread messages has changed."""
        self._database.unread_changed(change)

    def declare_complete(self) -> None:
        """Writer. The operator's word: what is here is to count without what is missing."""
        with self._database.transaction():
            unread.give_up(self._database.writer)
            self._database.state = replace(self._database.state, hole="", hole_ends="", unread=0, unread_bytes=0)

    def note_synced(self, server_ms: int) -> None:
        """Any thread. This node had read everything there was at that server time; durable with the next write
        transaction."""
        self._database.note_synced(server_ms)

    def synced_at_ms(self, positions: Sequence[Position]) -> int:
        """Writer. A time by the server's clock up to which this node knows all that streams held; 0: it never read
        any. positions: the streams that there are."""
        writer = self._database.writer
        read = [tables.load_position(writer, position.stream) for position in positions]
        stored = [position.stored_ns // 1_000_000 if position else 0 for position in read]
        # What was read after a message that could not be read is not all.
        stored += [first] if (first := unread.first_ms(writer)) is not None else []
        return max(self._database.state.synced_at_ms, min(stored, default=0))

    def arrive(
        self,
        positions: Sequence[Position],
        *,
        synced_at_ms: int,
        tombstones_since_ms: int,
        unread_there: Sequence[unread.Kept] = (),
    ) -> None:
        """Writer, inside `judge`. A snapshot was merged: the streams go on after `positions`, or after what was read
        already; nothing is missing here any more, but what its node could not read (`unread_there`), and what was
        missed behind `positions`.

        Of `tombstones_since_ms` the snapshot's counts, as it has what was forgotten here; not for what this node has
        read beyond it, or in another stream.
        """
        writer, state = self._database.writer, self._database.state
        if self._is_filled(positions):
            state = replace(state, hole="", hole_ends="")
        unread.arrive(writer, positions, unread_there)
        behind = True
        for position in positions:
            known = tables.load_position(writer, position.stream)
            behind &= known is None or (known.created == position.created and known.sequence <= position.sequence)
            if known is None or known.created != position.created or known.sequence < position.sequence:
                tables.save_position(writer, position)
        self._database.state = replace(
            state,
            synced_at_ms=max(state.synced_at_ms, synced_at_ms),
            tombstones_since_ms=(
                tombstones_since_ms if behind else max(tombstones_since_ms, state.tombstones_since_ms)
            ),
        )
        self._database.count_unread()
