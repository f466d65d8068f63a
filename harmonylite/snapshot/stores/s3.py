"""Snapshots in S3 or a service that speaks it, through a short-lived child process per request (`s3_child`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonylite.config.model import SnapshotS3
from harmonylite.snapshot.manifest import Manifest, is_id
from harmonylite.snapshot.stores.base import (
    ABANDONED_S,
    CorruptSnapshot,
    Ids,
    Manifests,
    Progress,
    SnapshotMissing,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    no_progress,
)
from harmonylite.snapshot.stores.files import fetch_verified, require_size
from harmonylite.tasks import cancelled

log = logging.getLogger(__name__)

_CHILD = "harmonylite.snapshot.stores.s3_child"
_ERRORS = {
    kind.__name__: kind for kind in (StoreUnavailable, StoreRefused, StoreFull, CorruptSnapshot, SnapshotMissing)
}
_LONGEST_LINE = 4 << 20
_LAST_WORDS = 2000


@dataclass(frozen=True, slots=True)
class S3Limits:
    """How long what may take, seconds.

    connect_s, read_s: of one request's steps; attempts: of one request; patience_s: without any sign of the child,
    which says so while bytes move; abandoned_s: see ABANDONED_S.
    """

    connect_s: float = 20.0
    read_s: float = 60.0
    attempts: int = 4
    patience_s: float = 180.0
    abandoned_s: float = ABANDONED_S


DEFAULT_LIMITS = S3Limits()


class S3Store:
    """A SnapshotStore in a bucket."""

    def __init__(self, settings: SnapshotS3, limits: S3Limits = DEFAULT_LIMITS) -> None:
        self._settings = settings
        self._limits = limits

    @property
    def costly(self) -> bool:
        """See SnapshotStore."""
        return True

    async def list(self) -> Manifests:
        """See SnapshotStore. A manifest whose object is missing or has another size is left out too."""
        found: Manifests = []
        await self._ask({"operation": "list"}, on_manifest=found.append)
        return found

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        await require_size(path, manifest)
        request = {"operation": "upload", "manifest": manifest.to_json().decode(), "path": str(path.absolute())}
        await self._ask(request, on_progress=lambda done: progress(done, manifest.stored_size))

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        request = {"operation": "download", "manifest": manifest.to_json().decode(), "path": str(path.absolute())}

        async def fetch(offset: int) -> None:
            progress(offset, manifest.stored_size)
            await self._ask(
                {**request, "offset": offset}, on_progress=lambda done: progress(done, manifest.stored_size)
            )

        await fetch_verified(manifest, path, fetch)

    async def delete(self, snapshot_id: str) -> None:
        """See SnapshotStore."""
        if not is_id(snapshot_id):
            raise StoreRefused(f"{snapshot_id!r} is not the id of a snapshot")
        await self._ask({"operation": "delete", "id": snapshot_id})

    async def prune(self, retain: int | None) -> Ids:
        """See SnapshotStore."""
        answer = await self._ask({"operation": "prune", "retain": retain, "abandoned_s": self._limits.abandoned_s})
        return [str(snapshot_id) for snapshot_id in answer or ()]

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """There is no second store."""
        return []

    async def close(self) -> None:
        """Nothing is under way between calls."""

    async def _ask(
        self,
        request: Mapping[str, Any],
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        on_manifest: Callable[[Manifest], None] = lambda manifest: None,
    ) -> Any:
        """Have a child do it; what it gives back. The child is gone when this ends, however it ends."""
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", _CHILD),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        last_words: list[str] = []
        listening = asyncio.create_task(_listen(child.stderr, last_words))
        try:
            # Secrets go through the pipe: a command line or an environment can be read by others.
            line = json.dumps({**request, "place": self._place(), "parent": os.getpid()})
            child.stdin.write(line.encode() + b"\n")
            while answer := await self._next(child.stdout):
                if "progress" in answer:
                    on_progress(int(answer["progress"]))
                elif "manifest" in answer:
                    on_manifest(Manifest.from_json(answer["manifest"].encode()))
                elif "log" in answer:
                    log.warning(answer["log"], extra={"fields": answer.get("fields", {})})
                elif "error" in answer:
                    raise _ERRORS.get(answer["error"], StoreError)(answer["message"])
                elif "done" in answer:
                    return answer["done"]
            await asyncio.wait([listening], timeout=1)
            raise StoreUnavailable(f"the process that speaks S3 ended early: {_last_line(last_words)}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.stdin.close()
            await cancelled(listening)
            await child.wait()

    async def _next(self, stdout: asyncio.StreamReader) -> dict[str, Any]:
        """The child's next answer; empty when it ended. Raises StoreUnavailable when it is silent for too long."""
        reading = asyncio.create_task(stdout.readline())
        done, _ = await asyncio.wait([reading], timeout=self._limits.patience_s)
        if not done:
            await cancelled(reading)
            where = self._settings.endpoint or "AWS"
            raise StoreUnavailable(f"S3 at {where} moved nothing for {self._limits.patience_s:g} s")
        line = reading.result()
        if not line.endswith(b"\n"):
            return {}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _place(self) -> dict[str, Any]:
        """The fields of `s3_bucket.Place`, which cannot be imported here: it needs botocore."""
        settings, limits = self._settings, self._limits
        return {
            "endpoint": settings.endpoint,
            "region": settings.region,
            "bucket": settings.bucket,
            "folder": settings.path,
            "use_ssl": settings.use_ssl,
            "access_key": settings.access_key.reveal(),
            "secret": settings.secret.reveal(),
            "session_token": settings.session_token.reveal(),
            "connect_timeout_s": limits.connect_s,
            "read_timeout_s": limits.read_s,
            "attempts": limits.attempts,
        }


async def _listen(stderr: asyncio.StreamReader, last_words: list[str]) -> None:
    """Keep the end of what the child complains about; never let it wait for a reader."""
    tail = b""
    while data := await stderr.read(4096):
        tail = (tail + data)[-_LAST_WORDS:]
        last_words[:] = tail.decode(errors="replace").splitlines()


def _last_line(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
