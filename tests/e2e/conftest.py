"""Where nodes keep their snapshots, for tests that hold in every such place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.snapshots import FolderPlace, NatsPlace, Place, S3Place
from tests.snapshot.seaweed import Seaweed, seaweed_or_skip


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A service for a module, as it takes seconds to start; each test has a folder of its own in its bucket."""
    yield from seaweed_or_skip(tmp_path_factory)


@pytest.fixture(params=["nats", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each store in turn; `parametrize("place", [...], indirect=True)` chooses, also "folder"."""
    if request.param == "s3":
        return S3Place(request.getfixturevalue("s3"), tmp_path.name)
    return NatsPlace() if request.param == "nats" else FolderPlace(tmp_path / "share")
