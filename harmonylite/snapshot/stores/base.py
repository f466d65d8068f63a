"""What every snapshot store does, and how it fails.

A store keeps, per snapshot, one object (opaque bytes, `Manifest.stored_size` of them) and its manifest, which is
written last: an upload that was torn is never listed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from harmonylite.snapshot.manifest import Manifest

# Called with (bytes done, bytes in all), now and then; resumed transfers begin above 0.
Progress = Callable[[int, int], None]
# Named here because a method below is called `list`.
Manifests = list[Manifest]
Ids = list[str]

# An upload that nobody went on with for this long is given up: `prune` removes what there is of it.
ABANDONED_S = 3600.0


class StoreError(Exception):
    """A store could not do what it was asked. One line for the operator: what, where, what to do."""


class StoreUnavailable(StoreError):  # noqa: N818 - a state of the store
    """No answer, or none now: try again later."""


class StoreRefused(StoreError):  # noqa: N818
    """Credentials, permission, a missing bucket, no room: it stays like that until somebody changes something."""


class StoreFull(StoreRefused):
    """No room for another snapshot: `prune` to fewer may make some."""


class CorruptSnapshot(StoreError):  # noqa: N818 - what was found
    """What the store holds is not what the manifest says: use another snapshot."""


class SnapshotMissing(StoreError):  # noqa: N818
    """The store holds no such snapshot (any more): use another one."""


def no_progress(done: int, total: int) -> None:
    """For who does not want to know."""


def beyond(manifests: Manifests, retain: int | None) -> Ids:
    """Of those, newest first, the ones that `prune` removes."""
    return [] if retain is None else [manifest.id for manifest in manifests[retain:]]


class SnapshotStore(Protocol):
    """One place that keeps snapshots.

    Every method raises StoreUnavailable or StoreRefused in bounded time when the place does not serve; a transfer
    may take as long as it moves. All may be cancelled; what was cancelled or failed is resumed by the same call.
    """

    @property
    def costly(self) -> bool:
        """Whether the last `list` took so much (a process of its own, requests through the Internet) that nobody should
        ask for another every few seconds for long."""

    async def list(self) -> Manifests:
        """The complete snapshots, newest first. A manifest that cannot be read is logged and left out."""

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """Store `path`, whose size and digest `manifest` tells. Again for one that is stored: nothing happens.

        Raises StoreFull, or CorruptSnapshot if `path` is not what the manifest says.
        """

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """Write the object to `path`, going on from what a broken download left there; size and digest are checked.

        Raises SnapshotMissing, or CorruptSnapshot (`path` is then removed).
        """

    async def delete(self, snapshot_id: str) -> None:
        """Remove a snapshot; nothing happens if there is none."""

    async def prune(self, retain: int | None) -> Ids:
        """Remove all but the newest `retain`, and what is left of uploads that were given up; None: only that, as the
        place may have got another snapshot since it was counted. The removed ids."""

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """Bring the second store, if there is one, level (see MirroredStore); the ids copied.

        folder: where one snapshot may lie meanwhile; the caller removes it when all is copied.
        """

    async def close(self) -> None:
        """End what is under way."""
