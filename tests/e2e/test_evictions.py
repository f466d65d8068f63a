"""OR REPLACE through indexes that no trigger watches, with real daemons: rows it removes are gone everywhere, small
tables and large ones, connected or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmonylite.db.evictions import LOOK_ROWS
from tests.e2e.cluster import eventually, hub_and_leaves

SCHEMA = """
CREATE TABLE small (id INTEGER PRIMARY KEY, email TEXT, active INTEGER);
CREATE UNIQUE INDEX small_email ON small (email) WHERE active = 1;
CREATE TABLE large (id INTEGER PRIMARY KEY, email TEXT);
CREATE UNIQUE INDEX large_email ON large (lower(email));
"""


@pytest.mark.slow
def test_rows_that_or_replace_removed_are_gone_everywhere(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, leaves=1)
    with cluster:
        one, two = cluster.start().nodes.values()
        one.execute("INSERT INTO small VALUES (1, 'a', 1), (2, 'b', 1)")
        one.execute(
            "INSERT INTO large WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " SELECT i, 'e' || i FROM n",
            LOOK_ROWS + 1_000,
        )
        cluster.wait_settled()
        one.execute("REPLACE INTO small VALUES (3, 'a', 1)")
        # The row that evicted others is gone before anybody can see that it clashes with them.
        one.execute("REPLACE INTO large VALUES (-1, 'E7')")
        one.execute("UPDATE large SET email = 'other' WHERE id = -1")
        two.stop()
        two.execute("REPLACE INTO small VALUES (4, 'b', 1)")
        two.execute("UPDATE small SET email = 'c' WHERE id = 4")
        two.start()
        eventually(lambda: not two.execute("SELECT 1 FROM large WHERE id = 7"), 60.0, "the large table's row to go")
        cluster.wait_settled()
        for node in (one, two):
            assert node.execute("SELECT * FROM small ORDER BY id") == [(3, "a", 1), (4, "c", 1)]
            assert node.execute("SELECT count(*) FROM large") == [(LOOK_ROWS + 1_000,)]
        # A migration of the application, while the daemons run.
        one.execute("DROP INDEX small_email")
        one.execute("ALTER TABLE small DROP COLUMN email")
        assert one.execute("SELECT id, active FROM small ORDER BY id") == [(3, 1), (4, 1)]


@pytest.mark.slow
def test_rows_removed_while_those_from_before_the_installation_become_known(tmp_path: Path) -> None:
    """Also by a daemon that is killed in between, and begins again."""
    rows = 300_000
    fill = (
        "INSERT INTO large WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {0})"
        " SELECT i, 'e' || i FROM n;"
    )
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA + fill.format(rows), leaves=1)
    with cluster:
        one, two = cluster.nodes.values()
        one.start()

        def known() -> int:
            [(count,)] = one.execute("SELECT count(*) FROM __harmonylite__large_version")
            return int(count)

        installed = "SELECT 1 FROM sqlite_schema WHERE name = '__harmonylite__large_version'"
        eventually(lambda: one.execute(installed) and known(), pause_s=0.002, what="the first rows to be known")
        one.kill()
        before = known()
        one.start()
        assert 0 < before < rows, "it was killed in between"
        eventually(lambda: known() > before, pause_s=0.002, what="that it begins again")
        # Nobody else can see a clash: the row that evicted the other has another value when it is published.
        with one.open_db() as connection:
            connection.execute("REPLACE INTO large VALUES (-1, ?)", (f"e{rows}",))
            connection.execute("UPDATE large SET email = 'other' WHERE id = -1")
            connection.execute("DELETE FROM large WHERE id = ?", (rows - 1,))
            connection.commit()
        two.start()
        eventually(lambda: known() == rows + 1, 60.0, "all rows to be known")
        eventually(lambda: not two.execute("SELECT 1 FROM large WHERE id = ?", rows), 60.0, "the evicted row to go")
        cluster.wait_settled()
        for node in (one, two):
            assert node.execute("SELECT id FROM large WHERE id < 2 OR id > ? ORDER BY id", rows - 3) == [
                (-1,),
                (1,),
                (rows - 2,),
            ]
