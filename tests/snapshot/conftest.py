"""One S3 service for all tests of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.snapshot.seaweed import Seaweed, seaweed_or_skip


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """SeaweedFS, started once. Each test uses a folder of its own."""
    yield from seaweed_or_skip(tmp_path_factory)
