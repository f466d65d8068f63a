"""What keeps one connection's groups from being published, as the operator sees it, and what follows for the rest.

Two kinds. A group that fails, or waits for its acknowledgement, is sent again until it works. A group that the stream
cannot hold stays pending; what waits behind it is published all the same, but the watermark stays before it: so all of
that is sent again whenever publishing begins anew, and receivers know it already. It fits once the stream holds more
([nats] max_store), or once the transaction may be cut (max_transaction_bytes).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from harmonylite.engine import Packed
from harmonylite.observe.log import Repeated
from harmonylite.stream.log import ApiError
from harmonylite.stream.publisher import GroupTooLarge, PublishFailed

if TYPE_CHECKING:
    from harmonylite.progress import Progress

log = logging.getLogger(__name__)


class PublishTrouble:
    """Keeps `progress.error` and `progress.refused` true, as far as publishing is concerned."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._failed, self._late = Repeated(log), Repeated(log)
        self._through: int | None = None  # the last batch of the group that `progress.error` is about
        self._refused: dict[int, str] = {}  # as in Progress, but of this connection

    @property
    def holds_back(self) -> bool:
        """Whether a group was refused, so that the watermark cannot move."""
        return bool(self._refused)

    def begin_again(self) -> None:
        """Everything that is pending is sent again, groups that were refused too."""
        self._refused = {}

    def acknowledged(self, group: Packed) -> None:
        if self._through is not None and group.through >= self._through:
            self._through = self._progress.error = None

    def all_done(self) -> None:
        """Nothing is under way and nothing waits, except for what was refused."""
        if self._through is not None:
            self._through = self._progress.error = None
        self._progress.refused = dict(self._refused)

    def failed(self, group: Packed, failure: PublishFailed) -> None:
        refused = isinstance(failure.__cause__, ApiError)
        self._progress.error = f"publishing {'is refused' if refused else 'fails'}: {failure}"
        self._through = group.through
        self._failed.warning("publication failed; it is done again", {"error": str(failure)})

    def late(self, group: Packed, seconds: float) -> None:
        """nats-server 2.15 never answers an atomic batch in whose middle its store became full."""
        self._progress.error = (
            f"publishing waits: {group.rows} rows, {len(group.payload)} bytes, are not acknowledged for {seconds:.0f} s"
        )
        self._through = group.through
        self._late.warning(
            "the stream does not acknowledge what was sent; a slow link needs longer, a full store may never answer",
            {"rows": group.rows, "bytes": len(group.payload), "since_s": round(seconds)},
        )

    def refused(self, group: Packed, refusal: GroupTooLarge) -> None:
        text = (
            f"{group.rows} rows of {', '.join(group.tables)} are not published: together they take {refusal.size}"
            f" bytes, stream {refusal.stream} holds {refusal.limit}"
        )
        if self._progress.refused.get(group.through) != text:
            fields = {
                "tables": list(group.tables),
                "rows": group.rows,
                "bytes": refusal.size,
                "stream": refusal.stream,
                "stream_max_bytes": refusal.limit,
                "to_do": "raise [nats] max_store where the stream is, or lower max_transaction_bytes here: it then"
                " arrives in steps",
            }
            log.error(
                "a transaction is larger than its stream; it stays here, later changes are published without it",
                extra={"fields": fields},
            )
        self._refused[group.through] = self._progress.refused[group.through] = text
