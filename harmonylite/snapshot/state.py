"""What is known and under way about snapshots on this node: for `status`, metrics and the command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harmonylite.observe.log import rfc3339
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.workfiles import Progress

OFF = "snapshots are switched off ([snapshot] enabled = false)"


# A snapshot that was of no use is tried again after so long, then after twice that.
REFUSED_S, LONGEST_REFUSED_S = 600.0, 86_400.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """sha256: of what was of no use; until: monotonic time; pause_s: how long that was."""

    sha256: str
    pause_s: float
    until: float


@dataclass(slots=True)
class SnapshotState:
    """newest: in the store, as far as known; store: its name; in_mirror: `newest` was found in the mirror, because the
    store has none or is away; taking, catching_up: what is being done now, for people; fraction: how far the present
    step of catching up is, 0 to 1; failure: why the last snapshot could not be taken; trouble: why the mirror is
    behind; unanswered: why the store did not say what it has; damage: what is wrong with this node's own database;
    refused: by id, snapshots that turned out to be of no use here."""

    store: str
    in_mirror: bool = False
    newest: Manifest | None = None
    taking: str | None = None
    catching_up: str | None = None
    fraction: float | None = None
    failure: str | None = None
    trouble: str | None = None
    unanswered: str | None = None
    damage: str | None = None
    refused: dict[str, Refusal] = field(default_factory=dict)

    def refuse(self, manifest: Manifest) -> None:
        """A snapshot turned out to be of no use here: others are used. What was in the way may pass: after a while it
        is tried again, then after twice that; at once if it was stored anew."""
        known = self.refused.get(manifest.id)
        again = known is not None and known.sha256 == manifest.sha256
        pause_s = min(2 * known.pause_s, LONGEST_REFUSED_S) if known is not None and again else REFUSED_S
        self.refused[manifest.id] = Refusal(manifest.sha256, pause_s, time.monotonic() + pause_s)

    def is_refused(self, manifest: Manifest) -> bool:
        """Whether a snapshot is not to be tried now."""
        known = self.refused.get(manifest.id)
        return known is not None and known.sha256 == manifest.sha256 and time.monotonic() < known.until

    def take(self, text: str) -> Progress:
        """A step of taking a snapshot begins; what to call with its progress."""

        def show(percent: str) -> None:
            self.taking = text + percent

        return _progress(show)

    def catch_up(self, text: str) -> Progress:
        """A step of catching up begins; what to call with its progress."""
        show_percent = _progress(lambda percent: setattr(self, "catching_up", text + percent))

        def report(done: int, total: int) -> None:
            self.fraction = min(1.0, done / total) if total else None
            show_percent(done, total)

        self.fraction = None
        return report

    def progress(self) -> float:
        """How far the present step of catching up is: 0 while nobody knows, as when waiting; 1 if there is none."""
        return 1.0 if self.catching_up is None else self.fraction or 0.0

    def caught_up(self) -> None:
        """Nothing is being done about a gap."""
        self.catching_up = self.fraction = None


def _progress(show: Callable[[str], None]) -> Progress:
    show("")

    def report(done: int, total: int) -> None:
        show(f", {min(100, 100 * done // total)} %" if total else "")

    return report


def describe(manifest: Manifest) -> dict[str, Any]:
    """A snapshot as commands print it."""
    return {
        "id": manifest.id,
        "taken_at": rfc3339(manifest.created_ms / 1000),
        "node_id": manifest.node_id,
        "version": manifest.version,
        "size_bytes": manifest.size,
        "stored_bytes": manifest.stored_size,
        "positions": {position.stream: position.sequence for position in manifest.positions},
    }
