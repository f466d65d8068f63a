"""The application never notices whether the daemon is there (I1), whatever SQLite it uses (I2).

The same statements, data and schema changes, while the daemon runs, is stopped, was killed, was cleaned up.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, Node, eventually, hub_and_leaves
from tests.e2e.languages import LANGUAGES, Language

STATES = ("up", "stopped", "killed", "cleaned", "forgotten")

# Tables of their own for each state.
SCHEMA = "".join(
    f"""
    CREATE TABLE item_{state} (id TEXT PRIMARY KEY COLLATE NOCASE, name TEXT UNIQUE, size INTEGER DEFAULT 0);
    CREATE TABLE old_{state} (id INTEGER PRIMARY KEY, a TEXT, b TEXT, CHECK (id > 0));
    CREATE TABLE early_{state} (id INTEGER PRIMARY KEY, v TEXT);
    INSERT INTO item_{state} VALUES ('first', 'before', 1), ('second', 'before too', 2);
    INSERT INTO old_{state} VALUES (1, 'a', 'b'), (2, 'a', 'b');
    INSERT INTO early_{state} VALUES (1, 'v');
    """
    for state in STATES
)


def data_changes(state: str) -> list[str]:
    item = f"item_{state}"
    return [
        "PRAGMA trusted_schema = OFF",
        "PRAGMA foreign_keys = ON",
        "BEGIN IMMEDIATE",
        f"INSERT INTO {item} VALUES ('third', 'new', 3), ('fourth', 'gone soon', 4)",
        f"UPDATE {item} SET size = size + 10 WHERE id = 'FIRST'",
        f"DELETE FROM {item} WHERE id = 'fourth'",
        "COMMIT",
        "BEGIN IMMEDIATE",
        f"DELETE FROM {item}",
        "ROLLBACK",
        f"INSERT OR REPLACE INTO {item} VALUES ('fifth', 'before too', 5)",  # evicts 'second'
        f"INSERT INTO {item} VALUES ('third', 'x', 0) ON CONFLICT (id) DO UPDATE SET size = 33",
        f"UPDATE {item} SET id = 'moved' WHERE id = 'first'",
    ]


def schema_changes(state: str) -> list[tuple[str, list[str]]]:
    """Each change of the schema, and what the application writes next.

    A table that is renamed after `cleanup` counts as a new one (docs/applications.md), so that is left out.
    """
    old, new, late = f"old_{state}", f"new_{state}", late_table(state)
    rename = f"ALTER TABLE early_{state} RENAME TO {late}" if state != "cleaned" else "ANALYZE"
    return [
        (f"ALTER TABLE {old} ADD COLUMN c TEXT DEFAULT 'c'", [f"UPDATE {old} SET c = 'written' WHERE id = 1"]),
        (f"ALTER TABLE {old} DROP COLUMN b", [f"INSERT INTO {old} (id, a) VALUES (3, 'without b')"]),
        (f"ALTER TABLE {old} RENAME COLUMN a TO a2", [f"UPDATE {old} SET a2 = 'renamed' WHERE id = 2"]),
        (f"CREATE INDEX index_{state} ON {old} (a2)", [f"INSERT INTO {old} (id, a2) VALUES (4, 'indexed')"]),
        (f"CREATE TABLE {new} (id INTEGER PRIMARY KEY, v)", []),
        (f"CREATE TABLE {new}_short (id INTEGER PRIMARY KEY)", [f"INSERT INTO {new}_short VALUES (1)"]),
        (f"DROP TABLE {new}_short", []),
        ("VACUUM", [f"DELETE FROM {old} WHERE id = 1"]),
        (rename, [f"INSERT INTO {late} VALUES (2, 'w')"]),
    ]


def late_table(state: str) -> str:
    return f"late_{state}" if state != "cleaned" else f"early_{state}"


def cases(*states: str) -> list[Any]:
    """Every language in every state; those that only repeat what others show are slow."""
    return [
        pytest.param(
            language,
            state,
            id=f"{language.name}-{state}",
            marks=[
                pytest.mark.skipif(bool(language.missing), reason=language.missing),
                *([] if language.name == "python" or state in ("stopped", "forgotten") else [pytest.mark.slow]),
            ],
        )
        for language in LANGUAGES
        for state in states
    ]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes, on which every row has a version."""
    made, _ = hub_and_leaves(tmp_path, SCHEMA, leaves=1)
    with made:
        one, two = made.start().nodes.values()
        for state in STATES:
            one.execute(f"UPDATE item_{state} SET size = size")
            one.execute(f"UPDATE old_{state} SET a = a")
            one.execute(f"UPDATE early_{state} SET v = v")
        # The last table written is published last.
        last = f"SELECT count(*) FROM __harmonylite__early_{STATES[-1]}_version"
        eventually(lambda: two.execute(last) == [(1,)] and made.converged(), what="versions on both nodes")
        yield made


def write_everything(language: Language, node: Node, state: str) -> None:
    statements = data_changes(state)
    for change, writes in schema_changes(state):
        statements += [change, *writes]
    language.run(node.db, statements)


def follow_schema(node: Node, state: str) -> None:
    """The other node's application is upgraded, too: schema changes are not replicated."""
    for change, _ in schema_changes(state):
        node.execute(change)


def rows(node: Node, state: str) -> list[list[tuple[object, ...]]]:
    tables = f"item_{state}", f"old_{state}", f"new_{state}", late_table(state)
    return [sorted(node.execute(f"SELECT * FROM {table}")) for table in tables]


def ours(node: Node) -> set[str]:
    found = node.execute("SELECT name FROM sqlite_schema WHERE name LIKE '\\_\\_harmonylite\\_\\_%' ESCAPE '\\'")
    return {name for (name,) in found}


def cleanup(node: Node, *options: str) -> None:
    command = [sys.executable, "-m", "harmonylite", "cleanup", *options, "--config", str(node.config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def enter(node: Node, state: str) -> None:
    """Bring the running daemon into a state."""
    if state == "killed":
        node.kill()
    elif state != "up":
        node.stop()
    if state == "cleaned":
        cleanup(node)
        assert not [name for name in ours(node) if name.endswith(("_insert", "_update", "_delete", "_change_log"))]
    elif state == "forgotten":
        cleanup(node, "--all")
        assert ours(node) == set()


def wait_same(one: Node, two: Node, state: str) -> None:
    eventually(lambda: rows(one, state) == rows(two, state), 20.0, f"the same rows on both nodes, {state}")


def captured(node: Node, table: str) -> bool:
    return f"__harmonylite__{table}_insert" in ours(node)


def bring_up(node: Node, state: str) -> None:
    if not node.running:
        node.start()
    eventually(lambda: captured(node, f"new_{state}"), what=f"the new table is captured, {state}")


@pytest.mark.parametrize(("language", "state"), cases(*STATES[:-1]))
def test_writes_and_schema_changes(cluster: Cluster, language: Language, state: str) -> None:
    one, two = cluster.nodes.values()
    enter(one, state)
    write_everything(language, one, state)
    follow_schema(two, state)
    bring_up(one, state)
    language.run(one.db, [f"INSERT INTO new_{state} VALUES (1, 'x')"])
    wait_same(one, two, state)
    assert rows(two, state) == [
        [("fifth", "before too", 5), ("moved", "before", 11), ("third", "new", 33)],
        [(2, "renamed", "c"), (3, "without b", "c"), (4, "indexed", "c")],
        [(1, "x")],
        [(1, "v"), (2, "w")],
    ]


@pytest.mark.parametrize(("language", "state"), cases("forgotten"))
def test_forgotten(cluster: Cluster, language: Language, state: str) -> None:
    """`cleanup --all`: nothing of ours is left to disturb; what is written after the next start replicates again."""
    one, two = cluster.nodes.values()
    enter(one, state)
    write_everything(language, one, state)
    assert ours(one) == set()
    follow_schema(two, state)
    bring_up(one, state)
    language.run(
        one.db,
        [
            "INSERT INTO new_forgotten VALUES (1, 'x')",
            "INSERT INTO late_forgotten VALUES (3, 'after')",
            "UPDATE old_forgotten SET c = 'after' WHERE id = 2",
        ],
    )
    eventually(lambda: rows(two, state)[2] == [(1, "x")], what="a row in the new table")
    eventually(lambda: (3, "after") in rows(two, state)[3], what="a row in the renamed table")
    eventually(lambda: two.execute("SELECT c FROM old_forgotten WHERE id = 2") == [("after",)], what="an update")


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES[:-1])
def test_rows_written_at_once_into_a_new_table(cluster: Cluster, state: str) -> None:
    """An application creates a table and fills it before the daemon can have noticed."""
    one, two = cluster.nodes.values()
    enter(one, state)
    two.execute(f"CREATE TABLE new_{state} (id INTEGER PRIMARY KEY, v)")
    with one.open_db() as db:
        db.execute(f"CREATE TABLE new_{state} (id INTEGER PRIMARY KEY, v)")
        db.execute(f"INSERT INTO new_{state} VALUES (1, 'at once')")
    bring_up(one, state)
    eventually(lambda: two.execute(f"SELECT * FROM new_{state}") == [(1, "at once")], 8.0, what="the row is there")
