"""Manifests, to bytes and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harmonylite.snapshot.manifest import BadManifest, Manifest, is_id, new_id
from tests.snapshot.support import snapshot


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = snapshot(tmp_path / "file", 10)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_ids_sort_by_time() -> None:
    ids = [new_id(ms, 7) for ms in (1_763_970_300_000, 1_763_970_301_000, 1_800_000_000_000)]
    assert ids == sorted(ids)
    assert ids[0].startswith("20251124T074500Z-7-")
    assert all(map(is_id, ids))
    assert is_id(new_id(0, 2**63 - 1))
    assert not any(map(is_id, ("", "../../etc/passwd", ids[0] + "/x", ids[0] + "\n", "20251124T074500Z-7-1A2B3C4D")))


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    manifest = snapshot(tmp_path / "file", 10)
    assert Manifest.from_json(json.dumps({**json.loads(manifest.to_json()), "colour": "blue"}).encode()) == manifest


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"id": "../x"},
        {"id": 7},
        {"node_id": "7"},
        {"node_id": True},
        {"size": -1},
        {"size": 1.5},
        {"sha256": "abc"},
        {"positions": {}},
        {"positions": [7]},
        {"positions": [{"stream": "s", "created": "c", "sequence": "1", "stored_ns": 0}]},
        {"positions": [{"stream": "s"}]},
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    fields = json.loads(snapshot(tmp_path / "file", 10).to_json())
    with pytest.raises(BadManifest) as caught:
        Manifest.from_json(json.dumps({**fields, **change}).encode())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"null"])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(BadManifest):
        Manifest.from_json(data)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    fields = json.loads(snapshot(tmp_path / "file", 10).to_json())
    del fields["schema"]
    with pytest.raises(BadManifest, match="schema"):
        Manifest.from_json(json.dumps(fields).encode())
