"""What is known and under way about snapshots on this node: for `status`, metrics and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harmonylite.observe.log import rfc3339
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.workfiles import Progress

OFF = "snapshots are switched off ([snapshot] enabled = false)"


@dataclass(slots=True)
class SnapshotState:
    """newest: in the store, as far as known; store: its name; taking, catching_up: what is being done now, for people;
    fraction: how far the present step of catching up is, 0 to 1; failure: why the last snapshot could not be taken;
    trouble: why the mirror is behind; refused: ids of snapshots that turned out to be of no use here."""

    store: str
    newest: Manifest | None = None
    taking: str | None = None
    catching_up: str | None = None
    fraction: float | None = None
    failure: str | None = None
    trouble: str | None = None
    refused: set[str] = field(default_factory=set)

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
