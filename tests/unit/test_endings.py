"""What an operator is told when a session ends by an error, and how long the next one waits."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from harmonylite.endings import Endings
from harmonylite.progress import Progress
from harmonylite.replication import BeginAgain
from harmonylite.stream.log import StreamUnavailable

DAMAGE = apsw.CorruptError("database disk image is malformed")


def test_a_damaged_database_is_told_plainly_and_tried_more_and_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    """Not once a second with a line each."""
    progress = Progress()
    endings = Endings(Path("/srv/app.db"), progress)
    pauses = []
    for _ in range(8):
        pauses.append(endings.note(DAMAGE))
        endings.note(StreamUnavailable("no answer"))
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0]
    endings.note(DAMAGE)
    assert progress.error is not None
    assert progress.error.startswith("this node's database /srv/app.db is damaged: database disk image is malformed")
    assert "docs/disaster-recovery.md" in progress.error
    assert caplog.messages == ["replication waits"] * 10, "one line each, and one about the log"


def test_other_ends_are_soon_followed_by_a_beginning() -> None:
    progress = Progress()
    endings = Endings(Path("app.db"), progress)
    assert endings.note(BeginAgain("the log broke")) == 1.0
    assert progress.error is None
    assert endings.note(ValueError("a mistake")) == 1.0
    assert progress.error == "ValueError: a mistake"
    endings.note(DAMAGE)
    endings.note(ValueError("a mistake"))
    assert endings.note(DAMAGE) == 10.0, "it could be read in between"
