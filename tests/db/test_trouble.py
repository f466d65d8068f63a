"""Messages, disks and locks that make trouble stop no node and lose nothing."""

from __future__ import annotations

import apsw
import pytest

from harmonylite.db.sql import integer
from harmonylite.db.tables import UNDECODABLE
from harmonylite.model import Group, Position, ReceivedGroup, Undecodable
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, EPOCH_MS, STREAM, deleted, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
IDV = ("id", "v")


def both(*groups: Group) -> Group:
    """Several groups as one transaction."""
    return Group(groups[0].publisher, 1, tuple(changes for group in groups for changes in group.tables))


def test_a_message_that_cannot_be_read_is_kept_counted_and_passed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    good = [ReceivedGroup(wrote("t", IDV, ((key, "x"), stamp(1, 2))), key, EPOCH_MS) for key in (1, 3)]
    applied = node.deliver(good, [Undecodable(2, b"\x00junk", "not a group")])
    assert applied.undecodable == 1
    assert node.rows("t") == [(1, "x"), (3, "x")]
    assert node.query(f"SELECT sequence, data, error FROM {UNDECODABLE}") == [(2, b"\x00junk", "not a group")]
    node.deliver((), [Undecodable(2, b"\x00junk", "not a group"), Undecodable(9, b"", "")])
    assert len(node.query(f"SELECT * FROM {UNDECODABLE}")) == 2
    assert node.replica.position(STREAM) == Position(STREAM, CREATED, 9, 1)


@pytest.mark.parametrize("kind", ["plain", "unique"])
def test_a_full_disk_in_the_middle_leaves_the_database_as_it_was(make: MakeNode, kind: str) -> None:
    unique = "UNIQUE" if kind == "unique" else ""
    node = make(1, f"CREATE TABLE t (id INTEGER PRIMARY KEY, u {unique}, v)")
    node.app.execute("BEGIN")
    for key in range(50):
        node.app.execute("INSERT INTO t VALUES (?, ?, 'mine')", (key, str(key)))
    node.app.execute("COMMIT")
    node.publish()
    node.replica.flush()
    theirs = [((100 + key, str(key), "x" * 3000), stamp(node.clock.now_ms + 5, 2)) for key in range(50)]
    group = wrote("t", ("id", "u", "v"), *theirs)
    pages = integer(node.writer, "PRAGMA page_count")
    before = node.everything()
    node.writer.execute(f"PRAGMA max_page_count={pages + 3}")
    for _ in range(2):
        with pytest.raises(apsw.FullError):
            node.apply(group)
        assert node.everything() == before
    node.writer.execute("PRAGMA max_page_count=1000000")
    node.apply(group)
    assert len(node.rows("t")) == (50 if unique else 100)
    node.sql("INSERT INTO t VALUES (500, 'after', 'capture works')")
    assert (500, "after", "capture works") in [row for row, _ in written(node.publish(), "t")]


def test_a_busy_database_is_a_busy_error_and_nothing_changed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.writer.setbusytimeout(1)
    group = wrote("t", IDV, ((2, "y"), stamp(EPOCH_MS, 2)))
    node.app.execute("BEGIN IMMEDIATE")
    for call in (node.replica.absorb, lambda: node.apply(group), lambda: node.replica.times.server_time(EPOCH_MS)):
        with pytest.raises(apsw.BusyError):
            call()
    node.app.execute("COMMIT")
    node.apply(group)
    assert node.rows("t") == [(1, "x"), (2, "y")]
    assert node.replica.pending() == 1


POISON = {
    "delete of another type": (PLAIN, deleted("t", (("abc",), stamp(EPOCH_MS, 2)))),
    "row of another type": (PLAIN, wrote("t", IDV, (("abc", 1), stamp(EPOCH_MS, 2)))),
    "large real key": (
        "CREATE TABLE t (id REAL PRIMARY KEY, v UNIQUE)",
        both(
            wrote("t", IDV, ((1e300, "x"), stamp(EPOCH_MS, 2))),
            wrote("t", IDV, ((1e301, "x"), stamp(EPOCH_MS + 1, 2))),
        ),
    ),
    "unknown table": (PLAIN, deleted("elsewhere", ((1,), stamp(EPOCH_MS, 2)))),
    "unknown column": (PLAIN, wrote("t", ("id", "v", "w"), ((1, 2, 3), stamp(EPOCH_MS, 2)))),
    "negative time": (PLAIN, wrote("t", IDV, ((1, 2), stamp(-5, 2)))),
    "time of the far future": (PLAIN, wrote("t", IDV, ((1, 2), stamp(2**63 - 1, 2)))),
    "another key": (PLAIN, wrote("t", ("v", "id"), ((1, 2), stamp(EPOCH_MS, 2)), key=("v",))),
    "nothing": (PLAIN, Group(2, 1, ())),
}


@pytest.mark.parametrize("what", POISON)
def test_one_poisoned_message_never_stops_a_node(make: MakeNode, what: str) -> None:
    script, group = POISON[what]
    node = make(1, script)
    node.apply(group, wrote("t", IDV, ((77, "good"), stamp(EPOCH_MS, 2))))
    assert (77, "good") in node.rows("t")
    assert node.received == 2
