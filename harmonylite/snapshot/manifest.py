"""What is known of a snapshot without fetching it; stored beside it, and after it."""

from __future__ import annotations

import calendar
import dataclasses
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harmonylite.model import Position

FORMAT = 1

# Names become file names, S3 keys and tokens of NATS subjects: nothing else may be in them.
_ID = re.compile(r"\d{8}T\d{6}Z-\d{1,19}-[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadManifest(ValueError):  # noqa: N818 - what was found
    """Not a manifest that this version can read; one line says why."""


def new_id(created_ms: int, node_id: int) -> str:
    """An id that sorts by time: `20261124T074500Z-7-1a2b3c4d`. created_ms: server time, milliseconds since 1970."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(created_ms / 1000))
    return f"{moment}-{node_id}-{secrets.token_hex(4)}"


def is_id(text: str) -> bool:
    """Does `text` look like the id of a snapshot?"""
    return _ID.fullmatch(text) is not None


def node_of(snapshot_id: str) -> int:
    """The node that took the snapshot with this id; `is_id` has to hold."""
    return int(snapshot_id.split("-")[1])


def time_of(snapshot_id: str) -> int | None:
    """When the snapshot with this id was taken, milliseconds since 1970; None if it is no id."""
    try:
        return calendar.timegm(time.strptime(snapshot_id.split("-")[0], "%Y%m%dT%H%M%SZ")) * 1000
    except ValueError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A snapshot's description.

    id: see `new_id`; node_id: who took it; version: of HarmonyLite; created_ms: server time, milliseconds since 1970;
    positions: how far each stream is contained; schema: fingerprint; size: bytes of the SQLite file; stored_size and
    sha256: of the compressed bytes, which are what a store keeps; tombstones_since_ms: deletes before that (server
    time) may be forgotten in it; unversioned: it has rows from before the installation, which are in no message.
    """

    id: str
    node_id: int
    version: str
    created_ms: int
    positions: tuple[Position, ...]
    schema: str
    size: int
    stored_size: int
    sha256: str
    tombstones_since_ms: int
    unversioned: bool = False
    format: int = FORMAT

    def to_json(self) -> bytes:
        """One JSON object, readable for people."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Read what `to_json` wrote; fields of later versions are passed over. Raises BadManifest."""
        try:
            fields = json.loads(data)
        except ValueError as error:
            raise BadManifest(f"the manifest is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise BadManifest("the manifest is not a JSON object")
        if fields.get("format") != FORMAT:
            raise BadManifest(f"the manifest has format {fields.get('format')!r}; this version reads {FORMAT}")
        try:
            return _manifest(fields)
        except KeyError as error:
            raise BadManifest(f"the manifest lacks {error}") from None

    def sort_key(self) -> tuple[int, str]:
        """Older snapshots first."""
        return self.created_ms, self.id


def in_order(manifests: Iterable[Manifest], latest_ms: int) -> list[Manifest]:
    """Newest first; those that claim to be from after `latest_ms`, which cannot be, last."""
    return sorted(manifests, key=lambda each: (each.created_ms <= latest_ms, *each.sort_key()), reverse=True)


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    positions = fields["positions"]
    if not isinstance(positions, list) or not all(isinstance(position, dict) for position in positions):
        raise BadManifest("the manifest's positions are not a list of objects")
    manifest = Manifest(
        id=_text(fields, "id"),
        node_id=_number(fields, "node_id"),
        version=_text(fields, "version"),
        created_ms=_number(fields, "created_ms"),
        positions=tuple(
            Position(
                stream=_text(position, "stream"),
                created=_text(position, "created"),
                sequence=_number(position, "sequence"),
                stored_ns=_number(position, "stored_ns"),
            )
            for position in positions
        ),
        schema=_text(fields, "schema"),
        size=_number(fields, "size"),
        stored_size=_number(fields, "stored_size"),
        sha256=_text(fields, "sha256"),
        tombstones_since_ms=_number(fields, "tombstones_since_ms"),
        unversioned=bool(fields.get("unversioned", False)),
    )
    if not is_id(manifest.id):
        raise BadManifest(f"the manifest's id is {manifest.id!r}, which is none")
    if not _SHA256.fullmatch(manifest.sha256):
        raise BadManifest("the manifest's sha256 is not 64 hexadecimal digits")
    return manifest


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadManifest(f"the manifest's {name} is not text")
    return value


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadManifest(f"the manifest's {name} is not a number from 0")
    return value
