"""Whether rows from before the installation are there: an answer that comes soon, or not at all when told to stop."""

from __future__ import annotations

import apsw
import pytest

from harmonylite.db import unversioned
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
    assert asked * unversioned.STOP_STEPS < 20_000 * 500
    node.absorb()
    assert not unversioned.exist(node.path, node.replica.schema)


def test_told_to_stop_it_does(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY)")
    node.sql(f"INSERT INTO t {ROWS} SELECT i FROM n")
    with pytest.raises(apsw.InterruptError):
        unversioned.exist(node.path, node.replica.schema, lambda: True)
