"""Times that are corrected keep nobody from the lock for longer than it takes to write them."""

from __future__ import annotations

from typing import Any

from harmonylite.model import Version
from tests.db.conftest import MakeNode
from tests.db.harness import DAY_MS, EPOCH_MS
from tests.db.test_absorb import PLAIN


def test_i1_times_that_are_right_are_looked_through_without_the_lock(make: MakeNode) -> None:
    """The first answer of the server after a long time offline finds much that waits."""
    node = make(1, PLAIN)
    fill = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 20000)"
    node.sql(f"{fill} INSERT INTO t SELECT x, x FROM n")
    node.absorb()
    node.replica.outgoing.hold(1)
    node.sql("UPDATE t SET v = 'pending'")
    node.absorb()
    locked = {"steps": 0, "now": 0}
    writer: Any = node.writer

    def trace(_: object, text: str, __: object) -> bool:
        locked["now"] = int(text == "BEGIN IMMEDIATE" or (locked["now"] and text not in ("COMMIT", "ROLLBACK")))
        return True

    def count() -> bool:
        locked["steps"] += 100 * locked["now"]
        return False

    writer.exectrace = trace
    writer.setprogresshandler(count, 100)
    node.replica.times.server_time(node.clock.now_ms)
    assert locked["steps"] < 20_000
    writer.exectrace = None
    writer.setprogresshandler(None)
    node.clock.now_ms += 400 * DAY_MS
    node.sql("INSERT INTO t VALUES (0, 'ahead')")
    node.absorb()
    node.replica.times._clamped = False
    node.replica.times.server_time(EPOCH_MS)
    assert node.version("t", 0) == Version(EPOCH_MS + 60_000, 1), "and what is not right is found"
