"""A database that comes from another machine: a repaired device, a restored backup, or a clone (DESIGN 7)."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmonylite.config import identity
from harmonylite.db.copy import adopt_copy
from tests.db.conftest import MakeNode
from tests.db.harness import Node
from tests.db.snapshots import copy_of

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [each.getMessage() for each in caplog.records if "on another machine before" in each.getMessage()]
    caplog.clear()
    return found


def test_a_database_from_another_machine_is_told_once_and_used(
    make: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    node = make(1, PLAIN)  # by a version that did not know its machine
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.restart(machine_id="one")
    node.restart(machine_id="one")
    node.restart(machine_id="")  # it cannot be read
    node.restart(machine_id="one")
    assert warnings(caplog) == []
    node.restart(machine_id="two")
    [line] = warnings(caplog)
    assert "one of the two needs another node_id" in line
    assert [each.publisher for each in node.publish()] == [1], "it goes on"
    node.restart(machine_id="two")
    assert warnings(caplog) == []
    node.restart(machine_id="one")
    assert len(warnings(caplog)) == 1, "and back"


def test_one_that_got_another_node_id_there_is_no_danger(make: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    node = make(1, PLAIN, machine_id="one")
    node.id = 2
    node.restart(machine_id="two")
    assert warnings(caplog) == []
    node.restart(machine_id="two")
    assert warnings(caplog) == []


def test_a_snapshot_of_another_node_is_no_clone(make: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """Also when that one's id is given to a device that replaces it."""
    path, _ = copy_of(make(1, PLAIN, machine_id="one"))
    adopt_copy(path, 1)
    node = Node(path, 1)
    node.start(machine_id="two")
    assert warnings(caplog) == []
    assert node.meta("machine_id") == "two"
    node.stop()
    node.app.close()


def test_the_database_does_not_tell_the_machine_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """machine-id(5) asks for that."""
    file = tmp_path / "machine-id"
    monkeypatch.setattr(identity, "MACHINE_ID_FILES", (file,))
    assert identity.machine_hash() == ""
    file.write_text("0123456789abcdef0123456789abcdef\n")
    one = identity.machine_hash()
    assert len(one) == 32
    assert "0123456789" not in one
    file.write_text("0123456789abcdef0123456789abcdee\n")
    assert identity.machine_hash() != one
