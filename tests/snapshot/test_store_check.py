"""`doctor` asks the places that snapshots are kept in, each by itself: what they hold, or why they do not serve."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmonylite.cli import store_check
from harmonylite.cli.checks import Check
from harmonylite.config import load
from harmonylite.snapshot.manifest import Manifest, new_id
from harmonylite.snapshot.stores.directory import DirectoryStore
from harmonylite.snapshot.stores.s3 import S3Store
from tests.snapshot.seaweed import BUCKET, Seaweed
from tests.snapshot.support import snapshot
from tests.stream.support import bare_server, free_port


def found(folder: Path, **keys: object) -> Mapping[str, Check]:
    """By name: "snapshots", and "mirror" if there is one. keys: with __ for the dot."""
    dotted: dict[str, Any] = {name.replace("__", "."): value for name, value in keys.items()}
    config = load(None, {"db_path": folder / "app.db", "node_id": 7, **dotted})
    checks = {check.name: check for check in store_check.checks(config)}
    assert not any(secret in repr(check) for check in checks.values() for secret in ("admin-secret", "not-it"))
    return checks


def an_hour_old(path: Path) -> Manifest:
    created_ms = round(time.time() * 1000) - 3_720_000
    return replace(snapshot(path, 100, node_id=3), id=new_id(created_ms, 3), created_ms=created_ms)


def s3_keys(s3: Seaweed, folder: str, **changes: object) -> dict[str, object]:
    keys = {
        "endpoint": f"127.0.0.1:{s3.port}",
        "bucket": BUCKET,
        "path": folder,
        "access_key": "admin-key",
        "secret": "admin-secret",
        **changes,
    }
    return {f"snapshot__s3__{name}": value for name, value in keys.items()}


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    share = tmp_path / "share"
    keys: dict[str, object] = {"snapshot__store": "file", "snapshot__file__path": str(share)}
    missing = found(tmp_path, **keys)["snapshots"]
    assert (missing.level, missing.advice) == ("fail", "create it")
    share.mkdir()
    empty = found(tmp_path, **keys)["snapshots"]
    assert (empty.level, empty.text) == ("ok", f"the folder {share} answers, and holds no snapshot yet")
    manifest = an_hour_old(tmp_path / "copy")
    asyncio.run(DirectoryStore(share).upload(manifest, tmp_path / "copy"))
    full = found(tmp_path, **keys)["snapshots"]
    assert (full.level, full.text) == (
        "ok",
        f"the folder {share} holds 1 snapshot, the newest 1 h 2 min old, by node 3",
    )


def test_snapshots_that_are_off(tmp_path: Path) -> None:
    assert found(tmp_path, snapshot__enabled=False)["snapshots"].level == "warn"


def test_the_store_in_nats_is_asked_through_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_server(tmp_path) as (url, _):
        check = found(tmp_path, nats__urls=[url])["snapshots"]
        assert check.level == "ok"
        assert check.text.endswith("in NATS answers, and holds no snapshot yet")
    monkeypatch.setattr(store_check, "CONNECT_S", 0.5)
    away = found(tmp_path, nats__urls=[url])["snapshots"]
    assert (away.level, "NATS cannot be reached" in away.text) == ("warn", True)


def test_the_bundled_server_without_a_daemon(tmp_path: Path) -> None:
    check = found(tmp_path)["snapshots"]
    assert (check.level, "start the daemon" in check.text) == ("warn", True)


def test_s3_that_serves_refuses_and_is_away(tmp_path: Path, s3: Seaweed) -> None:
    """The mirror is told apart from the store, which is in order."""
    share, folder = tmp_path / "share", f"tests/{uuid.uuid4().hex}"
    share.mkdir()
    manifest = an_hour_old(tmp_path / "copy")
    asyncio.run(S3Store(s3.settings(folder)).upload(manifest, tmp_path / "copy"))
    serves = found(tmp_path, snapshot__store="s3", **s3_keys(s3, folder))["snapshots"]
    assert serves.level == "ok"
    where = f"S3 bucket {BUCKET} at 127.0.0.1:{s3.port}"
    assert serves.text == f"{where} holds 1 snapshot, the newest 1 h 2 min old, by node 3"

    first: dict[str, object] = {"snapshot__store": "file", "snapshot__file__path": str(share), "snapshot__mirror": "s3"}
    refuses = found(tmp_path, **first, **s3_keys(s3, folder, secret="not-it"))
    assert (refuses["snapshots"].level, refuses["mirror"].level) == ("ok", "fail")
    assert "check [snapshot.s3] secret" in refuses["mirror"].text

    begun = time.monotonic()
    away = found(tmp_path, **first, **s3_keys(s3, folder, endpoint=f"127.0.0.1:{free_port()}"))["mirror"]
    assert (away.level, "cannot be reached" in away.text) == ("warn", True)
    assert "replication goes on" in away.advice
    assert time.monotonic() - begun < 20, "with short limits"


def test_a_store_that_never_comes_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: DirectoryStore) -> list[Manifest]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(DirectoryStore, "list", never)
    monkeypatch.setattr(store_check, "LIST_S", 0.1)
    check = found(tmp_path, snapshot__store="file", snapshot__file__path=str(tmp_path))["snapshots"]
    assert (check.level, "within 0.1 s" in check.text) == ("warn", True)
