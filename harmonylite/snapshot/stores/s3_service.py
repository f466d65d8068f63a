"""Snapshots in an S3 bucket: `<folder>/<id>.sqlite.zst`, sent in parts, and `<folder>/<id>.json` after it.

Runs in the child process; needs botocore.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from harmonylite.snapshot.manifest import BadManifest, Manifest, is_id
from harmonylite.snapshot.stores.base import CorruptSnapshot, Ids, Manifests, SnapshotMissing, beyond
from harmonylite.snapshot.stores.directory import MANIFEST_SUFFIX, OBJECT_SUFFIX
from harmonylite.snapshot.stores.files import file_error
from harmonylite.snapshot.stores.s3_bucket import Bucket, Found, Part, Upload, Window
from harmonylite.snapshot.stores.s3_errors import TRANSPORT_ERRORS, explain

log = logging.getLogger(__name__)

# S3 takes parts from 5 MiB, and 10,000 of them. Small ones: a part that breaks is sent again from its beginning.
SMALLEST_PART = 5 << 20
_MOST_PARTS = 10_000
_MIB = 1 << 20
_LARGEST_MANIFEST = _MIB
# A download that breaks is gone on with, so often without a byte in between.
_DOWNLOAD_TRIES = 4


class Service:
    """The snapshots of one bucket. Methods raise StoreError; see SnapshotStore for what they do."""

    def __init__(self, bucket: Bucket, alive: Callable[[], None], progress: Callable[[int], None]) -> None:
        """alive: called while bytes move; progress: called with the bytes done."""
        self._bucket = bucket
        self._alive = alive
        self._progress = progress

    def list(self) -> Manifests:
        """The complete snapshots, newest first."""
        return self._complete(self._bucket.objects())

    def upload(self, manifest: Manifest, path: Path) -> None:
        """Send what is missing of a snapshot, its manifest last."""
        present = self._bucket.objects(manifest.id)
        described, stored = manifest.id + MANIFEST_SUFFIX, manifest.id + OBJECT_SUFFIX
        whole = stored in present and present[stored].size == manifest.stored_size
        if whole and described in present:
            return
        if not whole:
            with _opened(path, "rb") as file:
                self._send(file, stored, manifest.stored_size)
        self._bucket.put(described, manifest.to_json())

    def download(self, manifest: Manifest, path: Path, offset: int) -> None:
        """Append the object to `path`, from `offset` on, going on when the connection breaks."""
        tries = 0
        with _opened(path, "ab") as file:
            while offset < manifest.stored_size:
                begun = offset
                try:
                    for data in self._bucket.read(manifest.id + OBJECT_SUFFIX, offset, manifest.stored_size):
                        _write(file, data, path)
                        offset += len(data)
                        self._progress(offset)
                    if offset < manifest.stored_size:
                        raise CorruptSnapshot(f"snapshot {manifest.id} ends at byte {offset} in {self._bucket}")
                except TRANSPORT_ERRORS as error:
                    tries = 1 if offset > begun else tries + 1
                    if tries >= _DOWNLOAD_TRIES:
                        raise explain(error, str(self._bucket)) from None
                    time.sleep(tries)

    def delete(self, snapshot_id: str) -> None:
        """The manifest first: what is listed is whole."""
        self._bucket.delete(snapshot_id + MANIFEST_SUFFIX)
        self._bucket.delete(snapshot_id + OBJECT_SUFFIX)
        for upload in self._bucket.uploads(snapshot_id):
            self._bucket.abort(upload)

    def prune(self, retain: int | None, abandoned_s: float) -> Ids:
        """See SnapshotStore."""
        objects = self._bucket.objects()
        removed = beyond(self._complete(objects), retain)
        for name, found in objects.items():
            snapshot_id = _id_of(name, OBJECT_SUFFIX)
            orphan = snapshot_id and snapshot_id + MANIFEST_SUFFIX not in objects
            if orphan and self._bucket.now_s - found.modified_s > abandoned_s:
                removed.append(snapshot_id)
        for upload in self._bucket.uploads():
            snapshot_id = _id_of(upload.name, OBJECT_SUFFIX)
            if not snapshot_id or snapshot_id in removed:
                continue
            if snapshot_id + MANIFEST_SUFFIX in objects:
                self._bucket.abort(upload)  # the beginning of one that was done again
            elif self._bucket.now_s - self._last_sign_s(upload) > abandoned_s:
                removed.append(snapshot_id)
        for snapshot_id in removed:
            self.delete(snapshot_id)
        return removed

    def _complete(self, objects: Mapping[str, Found]) -> Manifests:
        complete = []
        for name in objects:
            snapshot_id = _id_of(name, MANIFEST_SUFFIX)
            manifest = self._manifest(name) if snapshot_id else None
            if manifest is None:
                continue
            stored = objects.get(snapshot_id + OBJECT_SUFFIX)
            if manifest.id == snapshot_id and stored is not None and stored.size == manifest.stored_size:
                complete.append(manifest)
            else:
                fields = {"name": name, "size": stored and stored.size, "expected": manifest.stored_size}
                log.warning("snapshot left out: its object is missing or torn", extra={"fields": fields})
        return sorted(complete, key=Manifest.sort_key, reverse=True)

    def _manifest(self, name: str) -> Manifest | None:
        try:
            return Manifest.from_json(self._bucket.get(name, _LARGEST_MANIFEST))
        except SnapshotMissing:  # removed since
            return None
        except BadManifest as error:
            log.warning("snapshot left out", extra={"fields": {"name": name, "error": str(error)}})
            return None

    def _send(self, file: BinaryIO, name: str, size: int) -> None:
        part_size = max(SMALLEST_PART, -(-size // _MOST_PARTS // _MIB) * _MIB)
        if size <= part_size:
            self._bucket.put(name, Window(file, 0, size, self._alive))
            self._progress(size)
            return
        spans = {
            number: (begin, min(part_size, size - begin)) for number, begin in enumerate(range(0, size, part_size), 1)
        }
        upload, parts = self._begun(name, spans)
        self._progress(_sum(parts))
        for number, (begin, length) in spans.items():
            if number not in parts:
                parts[number] = self._bucket.send(upload, number, Window(file, begin, length, self._alive))
                self._progress(_sum(parts))
        self._bucket.complete(upload, parts)

    def _begun(self, name: str, spans: Mapping[int, tuple[int, int]]) -> tuple[Upload, dict[int, Part]]:
        """An upload that was begun, with those of its parts that fit; else a new one."""
        for upload in self._bucket.uploads(name):
            if upload.name == name:
                stored = self._bucket.parts(upload)
                fit = {number: part for number, part in stored.items() if part.size == spans.get(number, (0, 0))[1]}
                return upload, fit
        return self._bucket.begin(name), {}

    def _last_sign_s(self, upload: Upload) -> float:
        return max([upload.begun_s, *(part.stored_s for part in self._bucket.parts(upload).values())])


def _id_of(name: str, suffix: str) -> str:
    """The id of the snapshot that an object with this suffix belongs to; empty if it is none of ours."""
    snapshot_id = name.removesuffix(suffix)
    return snapshot_id if name.endswith(suffix) and is_id(snapshot_id) else ""


def _sum(parts: Mapping[int, Part]) -> int:
    return sum(part.size for part in parts.values())


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[BinaryIO]:
    try:
        file: BinaryIO = path.open(mode)  # type: ignore[assignment]
    except OSError as error:
        raise file_error(error, path) from None
    with file:
        yield file


def _write(file: BinaryIO, data: bytes, path: Path) -> None:
    """An error of the disk is not one of the connection."""
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise file_error(error, path) from None
