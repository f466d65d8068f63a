"""Whether rows from before the installation are there: an answer that comes soon, or not at all when told to stop."""

from __future__ import annotations

import apsw
import pytest

from harmonylite.db import sql, unversioned
from tests.db.conftest import MakeNode

ROWS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
KEYS = {"integer": ("id INTEGER PRIMARY KEY", "i"), "two columns": ("a TEXT, b, PRIMARY KEY (a, b)", "'x' || i, i")}


@pytest.mark.parametrize("keys", KEYS)
def test_what_was_written_a_moment_ago_is_looked_up_not_searched(make: MakeNode, keys: str) -> None:
    """A log read once for each of its rows kept a daemon from stopping for minutes."""
    columns, values = KEYS[keys]
    node = make(1, f"CREATE TABLE t ({columns})")
    node.sql(f"INSERT INTO t {ROWS} SELECT {values} FROM n")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return False

    assert not unversioned.exist(node.path, node.replica.schema, stop)
    assert asked * sql.STOP_STEPS < 20_000 * 500
    node.absorb()
    assert not unversioned.exist(node.path, node.replica.schema)


def test_told_to_stop_it_does(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY)")
    node.sql(f"INSERT INTO t {ROWS} SELECT i FROM n")
    with pytest.raises(apsw.InterruptError):
        unversioned.exist(node.path, node.replica.schema, lambda: True)


def test_a_row_that_nobody_knows_is_not_outnumbered_by_deletes_that_wait(make: MakeNode) -> None:
    """Two versions, two rows: one row has none."""
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY); INSERT INTO t VALUES (1)")
    node.sql("INSERT INTO t VALUES (2), (3)")
    node.absorb()
    node.sql("DELETE FROM t WHERE id = 2")
    assert unversioned.exist(node.path, node.replica.schema)


def test_a_row_that_was_not_evicted_after_all_is_one_that_nobody_knows(make: MakeNode) -> None:
    """It is in the log, and yet it gets no version."""
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE); INSERT INTO t VALUES (1, 1)")
    node.sql("INSERT OR IGNORE INTO t VALUES (2, 1)")
    assert node.query('SELECT k0 FROM "__harmonylite__t_change_log"') == [(1,)]
    assert unversioned.exist(node.path, node.replica.schema)
