"""Snapshots in S3: against SeaweedFS, directly and through a network that is slow, breaks, or swallows everything."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmonylite.config.model import SnapshotS3
from harmonylite.config.values import Secret
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    SnapshotMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)
from harmonylite.snapshot.stores.s3 import S3Limits, S3Store
from tests.snapshot.proxy import proxied, refusing
from tests.snapshot.seaweed import BUCKET, Seaweed
from tests.snapshot.support import MIB, Recorded, like, snapshot
from tests.stream.support import eventually, free_port, make_certificates, process_exists

exceptions = pytest.importorskip("botocore.exceptions", reason="no boto3: install harmonylite[s3]")
s3_errors = importlib.import_module("harmonylite.snapshot.stores.s3_errors")

PART = 5 * MIB  # the smallest that S3 takes, and the one of small snapshots
QUICK = S3Limits(connect_s=2.0, read_s=2.0, attempts=2, patience_s=10.0)
NOWHERE = SnapshotS3(endpoint="127.0.0.1:9", bucket=BUCKET, access_key=Secret("key"), secret=Secret("top-secret"))


@pytest.fixture
def folder() -> str:
    """A folder of the bucket that no other test uses."""
    return f"tests/{uuid.uuid4().hex}"


def children() -> list[int]:
    """Processes of ours that speak S3."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"s3_child" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    """The error's text, which an operator can read and which tells no secret."""
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert not any(secret in text for secret in ("top-secret", "admin-secret", "reader-secret", "the-token"))
    return text


async def cancelled_at(transfer: Callable[[Recorded], Any], at: int) -> None:
    """Start a transfer and cancel it as soon as `at` bytes are done."""
    task: asyncio.Task[None] = asyncio.create_task(transfer(Recorded(at, lambda: task.cancel() and None)))
    with pytest.raises(asyncio.CancelledError):
        await task


def every_call(store: S3Store, manifest: Manifest, source: Path, target: Path) -> list[Callable[[], Awaitable[Any]]]:
    return [
        lambda: store.list(),
        lambda: store.upload(manifest, source),
        lambda: store.download(manifest, target),
        lambda: store.prune(1),
        lambda: store.delete(manifest.id),
    ]


def test_what_was_uploaded_is_listed_newest_first_and_comes_back(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        store = S3Store(s3.settings(folder))
        assert await store.list() == []
        manifest = snapshot(source, 12 * MIB + 17)
        older = snapshot(tmp_path / "small", 100, age=50)
        await store.upload(older, tmp_path / "small")
        await store.upload(manifest, source, progress)
        assert await store.list() == [manifest, older]
        again = Recorded()
        await store.upload(manifest, source, again)
        assert again.calls == []  # nothing happens
        await store.download(manifest, target, progress)
        assert target.read_bytes() == source.read_bytes()
        await store.download(older, tmp_path / "small copy")
        await store.delete(manifest.id)
        assert await store.list() == [older]
        with pytest.raises(SnapshotMissing):
            await store.download(manifest, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        assert children() == []

    source, target, progress = tmp_path / "source", tmp_path / "target", Recorded()
    asyncio.run(scenario())
    assert progress.last == (12 * MIB + 17, 12 * MIB + 17)
    assert sorted(name.partition(".")[2] for name in s3.keys(folder)) == ["json", "sqlite.zst"]


@pytest.mark.slow
def test_snapshots_may_lie_at_the_top_of_the_bucket(tmp_path: Path, s3: Seaweed) -> None:
    async def scenario() -> None:
        store = S3Store(s3.settings(""))
        manifest = snapshot(tmp_path / "source", 100)
        await store.upload(manifest, tmp_path / "source")
        assert await store.list() == [manifest]
        await store.delete(manifest.id)
        assert await store.list() == []

    asyncio.run(scenario())


def test_a_torn_upload_is_not_listed_and_is_resumed(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        manifest = snapshot(source, 4 * PART)
        async with proxied(s3.port) as proxy:
            store = S3Store(s3.settings(folder, port=proxy.port), QUICK)
            loop = asyncio.get_running_loop()

            def breaks() -> None:  # in the middle of the third part, and again when that is repeated
                proxy.cut_after_up = MIB
                loop.call_soon(proxy.break_all)

            began = time.monotonic()
            with pytest.raises(StoreUnavailable) as caught:
                await store.upload(manifest, source, Recorded(2 * PART, breaks))
            assert time.monotonic() - began < 20
            one_line(caught)
            proxy.cut_after_up = None
            assert await store.list() == []
            assert len(s3.uploads(folder)) == 1
            progress = Recorded()
            proxy.up = 0
            await store.upload(manifest, source, progress)
            assert progress.first == 2 * PART
            assert proxy.up < 2.2 * PART
            assert await store.list() == [manifest]
            await store.download(manifest, tmp_path / "target")
        assert s3.uploads(folder) == []

    source = tmp_path / "source"
    asyncio.run(scenario())


@pytest.mark.slow
def test_an_upload_goes_on_when_the_connection_breaks_once_in_a_part(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        manifest = snapshot(tmp_path / "source", 3 * PART)
        async with proxied(s3.port, cut_after_up=7 * MIB, cuts=1) as proxy:
            store = S3Store(s3.settings(folder, port=proxy.port), QUICK)
            await store.upload(manifest, tmp_path / "source")
            assert proxy.cuts == 0
            await store.download(manifest, tmp_path / "target")

    asyncio.run(scenario())


def test_a_broken_download_is_resumed(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        manifest = snapshot(source, 8 * MIB)
        await S3Store(s3.settings(folder)).upload(manifest, source)
        async with proxied(s3.port, rate=20e6) as proxy:
            store = S3Store(s3.settings(folder, port=proxy.port), QUICK)
            await cancelled_at(lambda progress: store.download(manifest, target, progress), 2 * MIB)
            kept = target.stat().st_size
            assert 2 * MIB <= kept < 8 * MIB
            proxy.down = 0
            progress = Recorded()
            await store.download(manifest, target, progress)
            assert progress.first == kept
            assert 8 * MIB - kept <= proxy.down < 8 * MIB - kept + 100_000
        assert target.read_bytes() == source.read_bytes()

    source, target = tmp_path / "source", tmp_path / "target"
    asyncio.run(scenario())


@pytest.mark.slow
def test_a_download_goes_on_as_long_as_each_connection_brings_something(
    tmp_path: Path, s3: Seaweed, folder: str
) -> None:
    async def scenario() -> None:
        manifest = snapshot(source, 12 * MIB)
        await S3Store(s3.settings(folder)).upload(manifest, source)
        async with proxied(s3.port, cut_after_down=2 * MIB) as proxy:
            store = S3Store(s3.settings(folder, port=proxy.port), replace(QUICK, attempts=1))
            await store.download(manifest, target)
            assert proxy.connections >= 6
        assert target.read_bytes() == source.read_bytes()
        async with proxied(s3.port, cut_after_down=500) as proxy:
            store = S3Store(s3.settings(folder, port=proxy.port), replace(QUICK, attempts=1))
            began = time.monotonic()
            with pytest.raises(StoreUnavailable) as caught:
                await store.download(manifest, tmp_path / "never")
            assert time.monotonic() - began < 30
            one_line(caught)

    source, target = tmp_path / "source", tmp_path / "target"
    asyncio.run(scenario())


@pytest.mark.parametrize(
    "damage",
    ["flipped", pytest.param("short", marks=pytest.mark.slow), pytest.param("long", marks=pytest.mark.slow)],
)
def test_a_damaged_object_is_detected_and_the_copy_removed(
    tmp_path: Path, s3: Seaweed, folder: str, damage: str
) -> None:
    async def scenario() -> None:
        store = S3Store(s3.settings(folder))
        manifest = snapshot(source, MIB)
        await store.upload(manifest, source)
        data = bytearray(source.read_bytes())
        if damage == "flipped":
            data[5] ^= 1
        body = {"flipped": bytes(data), "short": bytes(data[:-1]), "long": bytes(data + b"x")}[damage]
        s3.client.put_object(Bucket=BUCKET, Key=f"{folder}/{manifest.id}.sqlite.zst", Body=body)
        with pytest.raises(CorruptSnapshot) as caught:
            await store.download(manifest, target)
        one_line(caught)
        assert not target.exists()
        if damage != "flipped":
            assert await store.list() == []

    source, target = tmp_path / "source", tmp_path / "target"
    asyncio.run(scenario())


def test_what_is_torn_is_not_listed(tmp_path: Path, s3: Seaweed, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        store = S3Store(s3.settings(folder))
        good = snapshot(tmp_path / "source", 1000)
        await store.upload(good, tmp_path / "source")
        no_object, broken = like(good, age=5), like(good, age=6)
        for manifest, text in ((no_object, no_object.to_json()), (broken, b'{"format": 1')):
            s3.client.put_object(Bucket=BUCKET, Key=f"{folder}/{manifest.id}.json", Body=text)
        s3.client.put_object(Bucket=BUCKET, Key=f"{folder}/readme.json", Body=b"{}")
        with caplog.at_level(logging.WARNING):
            assert await store.list() == [good]

    asyncio.run(scenario())
    assert len([record for record in caplog.records if "left out" in record.message]) == 2


@pytest.mark.slow
def test_retention_keeps_the_newest_and_what_is_still_being_written(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        store = S3Store(s3.settings(folder))
        assert await store.prune(3) == []
        first = snapshot(source, 1000)
        manifests = [first, like(first, age=10), like(first, age=20)]
        for manifest in manifests:
            await store.upload(manifest, source)
        torn, orphan = like(first, age=100), like(first, age=200)
        key = f"{folder}/{torn.id}.sqlite.zst"
        begun = s3.client.create_multipart_upload(Bucket=BUCKET, Key=key)
        s3.client.upload_part(Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * PART)
        s3.client.put_object(Bucket=BUCKET, Key=f"{folder}/{orphan.id}.sqlite.zst", Body=b"x")
        assert await store.prune(1) == [manifests[1].id, manifests[2].id]
        assert await store.list() == manifests[:1]
        assert len(s3.uploads(folder)) == 1
        impatient = S3Store(s3.settings(folder), replace(QUICK, abandoned_s=-5.0))
        assert sorted(await impatient.prune(1)) == sorted([torn.id, orphan.id])
        assert s3.uploads(folder) == []
        assert sorted(s3.keys(folder)) == [f"{first.id}.json", f"{first.id}.sqlite.zst"]

    source = tmp_path / "source"
    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"access_key": Secret("unknown")}, "access_key"),
        ({"secret": Secret("wrong")}, "secret"),
        ({"bucket": "nobody-made-this"}, "bucket"),
        pytest.param({"bucket": "Not A Name"}, "bucket", marks=pytest.mark.slow),
        pytest.param({"use_ssl": True}, "use_ssl", marks=pytest.mark.slow),
        pytest.param({"endpoint": "http://[nonsense"}, "snapshot.s3", marks=pytest.mark.slow),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    tmp_path: Path, s3: Seaweed, folder: str, changes: dict[str, Any], words: str
) -> None:
    async def scenario() -> None:
        store = S3Store(s3.settings(folder, **changes), QUICK)
        with pytest.raises(StoreRefused) as caught:
            await store.list()
        assert words in one_line(caught)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_user_who_may_only_read_reads_and_is_refused_writing(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        manifest = snapshot(source, 6 * MIB)
        await S3Store(s3.settings(folder)).upload(manifest, source)
        reader = S3Store(s3.settings(folder, user="reader"), QUICK)
        assert await reader.list() == [manifest]
        await reader.download(manifest, tmp_path / "target")
        for call in (reader.upload(like(manifest, age=1), source), reader.delete(manifest.id), reader.prune(0)):
            with pytest.raises(StoreRefused) as caught:
                await call
            assert "denies access" in one_line(caught)
        assert await reader.list() == [manifest]

    source = tmp_path / "source"
    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "ExpiredToken", StoreRefused, "session_token"),
        (403, "AccessDenied", StoreRefused, "denies access"),
        (403, "SomethingNew", StoreRefused, "denies access"),
        (403, "RequestTimeTooSkewed", StoreUnavailable, "clock"),
        (400, "AuthorizationHeaderMalformed", StoreRefused, "region"),
        (301, "PermanentRedirect", StoreRefused, "region"),
        (404, "NoSuchBucket", StoreRefused, "bucket"),
        (404, "NoSuchKey", SnapshotMissing, "no such snapshot"),
        (507, "XMinioStorageFull", StoreFull, "room"),
        (403, "QuotaExceeded", StoreFull, "room"),
        (503, "SlowDown", StoreUnavailable, "answers SlowDown"),
        (500, "InternalError", StoreUnavailable, "answers InternalError"),
        (404, "NoSuchUpload", StoreUnavailable, "answers NoSuchUpload"),
        (405, "MethodNotAllowed", StoreRefused, "MethodNotAllowed"),
    ],
)
def test_what_a_service_answers_is_told_in_one_line(status: int, code: str, kind: type[Exception], words: str) -> None:
    answer: dict[str, Any] = {
        "Error": {"Code": code, "Message": "for no\nreason"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    explained = s3_errors.explain(exceptions.ClientError(answer, "PutObject"), "S3 bucket b at host:1")
    assert type(explained) is kind
    assert str(explained).startswith("S3 bucket b at host:1 ")
    assert words in str(explained)
    assert "\n" not in str(explained)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (exceptions.EndpointConnectionError(endpoint_url="http://x"), StoreUnavailable, "cannot be reached"),
        (exceptions.ConnectTimeoutError(endpoint_url="http://x"), StoreUnavailable, "does not answer"),
        (exceptions.ReadTimeoutError(endpoint_url="http://x"), StoreUnavailable, "does not answer"),
        (exceptions.ConnectionClosedError(endpoint_url="http://x"), StoreUnavailable, "hung up"),
        (exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnavailable, "hung up"),
        (exceptions.NoCredentialsError(), StoreRefused, "access_key"),
        (exceptions.PartialCredentialsError(provider="env", cred_var="x"), StoreRefused, "access_key"),
        (exceptions.ParamValidationError(report="bad\nname"), StoreRefused, "[snapshot.s3]"),
        (
            exceptions.SSLError(endpoint_url="https://x", error="[SSL: CERTIFICATE_VERIFY_FAILED] x"),
            StoreRefused,
            "certificate",
        ),
        (exceptions.SSLError(endpoint_url="https://x", error="EOF"), StoreUnavailable, "TLS"),
        (ConnectionResetError(104, "Connection reset by peer"), StoreUnavailable, "reset"),
    ],
)
def test_what_happens_on_the_way_is_told_in_one_line(error: Exception, kind: type[Exception], words: str) -> None:
    explained = s3_errors.explain(error, "S3 bucket b at host:1")
    assert type(explained) is kind
    assert str(explained).startswith("S3 bucket b at host:1")
    assert words in str(explained)
    assert "\n" not in str(explained)


def test_a_refusal_comes_as_one_line_and_the_token_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with refusing("403 Forbidden", "ExpiredToken") as service:
            settings = replace(NOWHERE, endpoint=f"127.0.0.1:{service.port}", session_token=Secret("the-token"))
            with pytest.raises(StoreRefused) as caught:
                await S3Store(settings, QUICK).list()
            assert "session_token" in one_line(caught)
            assert "x-amz-security-token: the-token" in service.heads[0].lower()
            assert service.heads[0].startswith(f"GET /{BUCKET}?")  # path style

    asyncio.run(scenario())


def test_the_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with refusing("403 Forbidden", "AccessDenied", tls) as service:
            store = S3Store(replace(NOWHERE, endpoint=f"127.0.0.1:{service.port}", use_ssl=True), QUICK)
            with pytest.raises(StoreRefused) as caught:
                await store.list()
            assert "certificate" in one_line(caught)
            assert service.heads == []
            monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates.ca))
            with pytest.raises(StoreRefused, match="denies access"):
                await store.list()

    certificates = make_certificates(tmp_path / "tls")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates.server_cert, certificates.server_key)
    asyncio.run(scenario())


def test_nobody_listens(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = S3Store(replace(NOWHERE, endpoint=f"127.0.0.1:{free_port()}"), QUICK)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            await store.list()
        assert time.monotonic() - began < 20
        assert "cannot be reached" in one_line(caught)

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["down", "black hole"])
def test_every_call_ends_in_bounded_time(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        manifest = snapshot(source, 6 * MIB)
        async with proxied(0, hole=True) as proxy:
            port = proxy.port if how == "black hole" else free_port()
            store = S3Store(replace(NOWHERE, endpoint=f"127.0.0.1:{port}"), QUICK)
            for call in every_call(store, manifest, source, tmp_path / "target"):
                began = time.monotonic()
                with pytest.raises(StoreUnavailable) as caught:
                    await call()
                assert time.monotonic() - began < 20
                one_line(caught)
            assert children() == []

    source = tmp_path / "source"
    asyncio.run(scenario())


@pytest.mark.slow
def test_a_child_that_is_silent_for_too_long_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with proxied(0, hole=True) as proxy:
            store = S3Store(
                replace(NOWHERE, endpoint=f"127.0.0.1:{proxy.port}"), S3Limits(read_s=600.0, patience_s=3.0)
            )
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="moved nothing"):
                await store.list()
            assert time.monotonic() - began < 10
            assert children() == []

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_slow_link_is_waited_for_as_long_as_bytes_move(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        manifest = snapshot(source, 8 * MIB)
        async with proxied(s3.port, rate=1.2e6) as proxy:
            store = S3Store(s3.settings(folder, port=proxy.port), replace(QUICK, patience_s=4.0))
            began = time.monotonic()
            await store.upload(manifest, source)
            assert time.monotonic() - began > 5  # a part alone takes longer than the patience
            began = time.monotonic()
            await store.download(manifest, tmp_path / "target")
            assert time.monotonic() - began > 5

    source = tmp_path / "source"
    asyncio.run(scenario())


def test_a_cancelled_call_leaves_no_process_and_tells_no_secret(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with proxied(0, hole=True) as proxy:
            settings = replace(NOWHERE, endpoint=f"127.0.0.1:{proxy.port}")
            call = asyncio.create_task(S3Store(settings).list())
            await eventually(lambda: proxy.connections)
            (child,) = children()
            for name in ("cmdline", "environ"):
                assert b"top-secret" not in Path(f"/proc/{child}/{name}").read_bytes()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not process_exists(child)

    asyncio.run(scenario())


_PARENT = """
import asyncio
import sys
from harmonylite.config.model import SnapshotS3
from harmonylite.config.values import Secret
from harmonylite.snapshot.stores.s3 import S3Store

asyncio.run(S3Store(SnapshotS3(endpoint=sys.argv[1], bucket="b", access_key=Secret("k"), secret=Secret("s"))).list())
"""


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with proxied(0, hole=True) as proxy:
            parent = subprocess.Popen([sys.executable, "-c", _PARENT, f"127.0.0.1:{proxy.port}"])  # noqa: ASYNC220
            try:
                await eventually(lambda: proxy.connections)
                tasks = Path(f"/proc/{parent.pid}/task")
                pids = [int(pid) for task in tasks.glob("*/children") for pid in task.read_text().split()]
                assert len(pids) == 1
                parent.send_signal(signal.SIGKILL)
                await eventually(lambda: not process_exists(pids[0]), 5)
            finally:
                parent.kill()
                parent.wait()

    asyncio.run(scenario())


def test_without_boto3_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "botocore.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'botocore'\", name='botocore')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StoreRefused) as caught:
        asyncio.run(S3Store(NOWHERE).list())
    assert "apt install python3-boto3, or in a virtual environment pip install boto3" in one_line(caught)


def test_without_credentials_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreRefused, match="no credentials"):
        asyncio.run(S3Store(replace(NOWHERE, access_key=Secret(), secret=Secret()), QUICK).list())


def test_credentials_of_the_environment_are_used(
    tmp_path: Path, s3: Seaweed, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "admin-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "admin-secret")
    assert asyncio.run(S3Store(s3.settings(folder, access_key=Secret(), secret=Secret()), QUICK).list()) == []


def test_a_child_that_crashes_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "botocore.py").write_text("raise RuntimeError('broken\\ninstallation')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StoreUnavailable) as caught:
        asyncio.run(S3Store(NOWHERE).list())
    assert "ended early: installation" in one_line(caught)


@pytest.mark.slow
def test_memory_of_parent_and_child_is_bounded(tmp_path: Path, s3: Seaweed, folder: str) -> None:
    async def scenario() -> None:
        peak_kb = 0

        def look(done: int, total: int) -> None:
            nonlocal peak_kb
            for child in children():
                with contextlib.suppress(FileNotFoundError):  # it has just said its last word
                    status = Path(f"/proc/{child}/status").read_text()
                    if "VmHWM:" in status:  # not a zombie
                        peak_kb = max(peak_kb, int(status.partition("VmHWM:")[2].split()[0]))

        store = S3Store(s3.settings(folder))
        manifest = snapshot(source, 80 * MIB)
        tracemalloc.start()
        await store.upload(manifest, source, look)
        await store.download(manifest, tmp_path / "target", look)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MIB
        assert 10_000 < peak_kb < 90_000

    source = tmp_path / "source"
    asyncio.run(scenario())
