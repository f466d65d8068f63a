"""What keeps one connection's groups from being published, as the operator sees it.

Two kinds. A group that fails, or waits for its acknowledgement, is sent again until it works. A transaction that the
stream cannot hold waits here, and nothing waits for it. It fits once the stream holds more ([nats] max_store), or once
it may be cut (max_transaction_bytes).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harmonylite.db.held import HELD
from harmonylite.observe.log import Repeated
from harmonylite.packing import Packed
from harmonylite.progress import TooLarge
from harmonylite.stream.log import ApiError
from harmonylite.stream.publisher import MAX_GROUP_BYTES, GroupTooLarge, PublishFailed

if TYPE_CHECKING:
    from harmonylite.progress import Progress

log = logging.getLogger(__name__)


class PublishTrouble:
    """Keeps `progress.error` and `progress.refused` true, as far as publishing is concerned."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._failed, self._late = Repeated(log), Repeated(log)
        self._about: tuple[bool, int] | None = None  # the place of the group that `progress.error` is about
        self._refused: set[int] = set()  # held batches, of which parts were refused since they were last tried

    def may_fit(self, held: Mapping[int, int], stream_bytes: int | None) -> bool:
        """Whether one of the held batches may fit into a stream of that size, although it may have been too large when
        it had more rows. held: their numbers of rows; what is known of others is forgotten."""
        refused, too_large = self._progress.refused, self._progress.too_large
        for batch in (refused.keys() | too_large.keys()) - held.keys():
            refused.pop(batch, None)
            too_large.pop(batch, None)
        most = MAX_GROUP_BYTES if stream_bytes is None else min(stream_bytes, MAX_GROUP_BYTES)
        # What is left of a batch is taken to be as large a part of it as of its rows.
        return any(
            (then := too_large.get(batch)) is None or then.size * rows <= most * then.rows
            for batch, rows in held.items()
        )

    def forget_sizes(self) -> None:
        """Something has changed for what is too large."""
        self._progress.too_large.clear()

    def begin_again(self) -> None:
        """What is held is tried again."""
        self._refused = set()

    def was_refused(self, group: Packed) -> bool:
        """Whether a part of this batch was refused since it was last tried."""
        return _held(group) in self._refused

    def published(self, group: Packed) -> None:
        if group.through == group.hi:
            self._progress.refused.pop(group.hi, None)
            self._progress.too_large.pop(group.hi, None)

    def acknowledged(self, group: Packed) -> None:
        if self._about is not None and _place(group) >= self._about:
            self._about = self._progress.error = None

    def all_done(self) -> None:
        """Nothing is under way and nothing waits, except for what is held."""
        if self._about is not None:
            self._about = self._progress.error = None

    def failed(self, group: Packed, failure: PublishFailed) -> None:
        refused = isinstance(failure.__cause__, ApiError)
        self._progress.error = f"publishing {'is refused' if refused else 'fails'}: {failure}"
        self._about = _place(group)
        self._failed.warning("publication failed; it is done again", {"error": str(failure)})

    def late(self, group: Packed, seconds: float) -> None:
        """nats-server 2.15 never answers an atomic batch in whose middle its store became full."""
        self._progress.error = (
            f"publishing waits: {group.rows} rows, {len(group.payload)} bytes, are not acknowledged for {seconds:.0f} s"
        )
        self._about = _place(group)
        self._late.warning(
            "the stream does not acknowledge what was sent; a slow link needs longer, a full store may never answer",
            {"rows": group.rows, "bytes": len(group.payload), "since_s": round(seconds)},
        )

    def cut(self, group: Packed, refusal: GroupTooLarge) -> None:
        """Transactions that wrote the same rows do not fit together."""
        fields = {"tables": list(group.tables), "rows": group.rows, **_sizes(refusal)}
        log.warning(
            "changes that belong together are larger than their stream; they are published in smaller groups",
            extra={"fields": fields},
        )

    def refused(self, group: Packed, refusal: GroupTooLarge, rows: int) -> None:
        """A transaction does not fit, or one of the parts into which it was cut; it is held. rows: in its batch now."""
        text = (
            f"{group.rows} rows of {', '.join(group.tables)} are not published: together they take {refusal.size}"
            f" bytes, {refusal.bound}"
        )
        batch = _held(group)
        if batch in self._refused:
            return  # another part of it
        if self._progress.refused.get(batch) != text:
            fields = {
                "tables": list(group.tables),
                "rows": group.rows,
                **_sizes(refusal),
                "to_do": refusal.to_do,
            }
            log.error(
                "a transaction is too large to be sent; it stays here, later changes are published without it",
                extra={"fields": fields},
            )
        self._refused.add(batch)
        self._progress.refused[batch] = text
        self._progress.too_large[batch] = TooLarge(refusal.size, rows)


def _place(group: Packed) -> tuple[bool, int]:
    """Where a group comes among those of one connection: what is held is sent before all others."""
    return not group.is_held, group.through


def _held(group: Packed) -> int:
    """The batch as which it is held, or would be."""
    return group.hi if group.is_held else HELD + group.hi


def _sizes(refusal: GroupTooLarge) -> dict[str, object]:
    return {"bytes": refusal.size, "stream": refusal.stream, "stream_max_bytes": refusal.limit}
