"""`harmonylite cleanup` takes our things out and loses nothing."""

from __future__ import annotations

import pytest

from harmonylite.db.cleanup import CleanupRefused, cleanup
from harmonylite.model import Version
from tests.db.conftest import MakeNode
from tests.db.harness import STREAM, ours, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
IDV = ("id", "v")


def test_cleanup_absorbs_first_and_keeps_versions_and_position(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY, v UNIQUE)", exclude=("nothing",))
    node.apply(wrote("t", IDV, ((1, "theirs"), stamp(1000, 2))))
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    at = node.clock.now_ms
    node.replica.close()
    report = cleanup(node.path, everything=False, force=False)
    assert (report.tables, report.absorbed, report.pending) == (2, 1, 1)
    assert node.query("SELECT count(*) FROM sqlite_schema WHERE type = 'trigger' OR name LIKE '%change_log'") == [(0,)]
    node.sql("UPDATE t SET v = 'unseen' WHERE id = 1")
    node.start()
    position = node.replica.position(STREAM)
    assert position is not None and position.sequence == 1
    assert sorted(row for row, _ in written(node.publish(), "t")) == [(1, "unseen"), (2, "logged")]
    assert node.version("t", 1) == Version(1001, 1)
    assert node.version("t", 2) == Version(at + 1, 1)


def test_cleanup_all_is_refused_while_unpublished_rows_exist(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    node.replica.close()
    before = node.everything()
    with pytest.raises(CleanupRefused, match="1 changed row"):
        cleanup(node.path, everything=True, force=False)
    assert node.everything() == before
    node.start()
    node.publish()
    node.stop()
    cleanup(node.path, everything=True, force=False)
    assert ours(node) == []
    assert node.rows("t") == [(2, "logged")]
    node.start()
    assert node.publish() == []


def test_cleanup_all_by_force(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    node.stop()
    assert cleanup(node.path, everything=True, force=True).pending == 1
    assert ours(node) == []
    assert cleanup(node.path, everything=True, force=False).tables == 0
    node.start()
