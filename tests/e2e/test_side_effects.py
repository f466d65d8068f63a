"""The application's own triggers and cascades, on three nodes: each side effect once, searches right (I8)."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, Node, eventually, hub_and_leaves

SCHEMA = """
CREATE TABLE article (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    body TEXT NOT NULL,
    comments INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE comment (
    id INTEGER PRIMARY KEY,
    article INTEGER NOT NULL REFERENCES article (id) ON DELETE CASCADE,
    text TEXT NOT NULL
);
CREATE TABLE audit (id TEXT PRIMARY KEY DEFAULT (hex(randomblob(16))), event TEXT NOT NULL, subject INTEGER NOT NULL);

-- A search index over a replicated table; the index itself is not replicated.
CREATE VIRTUAL TABLE search USING fts5 (title, body, content = 'article', content_rowid = 'id');
CREATE TRIGGER search_insert AFTER INSERT ON article BEGIN
    INSERT INTO search (rowid, title, body) VALUES (NEW.id, NEW.title, NEW.body);
END;
CREATE TRIGGER search_delete AFTER DELETE ON article BEGIN
    INSERT INTO search (search, rowid, title, body) VALUES ('delete', OLD.id, OLD.title, OLD.body);
END;
CREATE TRIGGER search_update AFTER UPDATE ON article BEGIN
    INSERT INTO search (search, rowid, title, body) VALUES ('delete', OLD.id, OLD.title, OLD.body);
    INSERT INTO search (rowid, title, body) VALUES (NEW.id, NEW.title, NEW.body);
END;

-- An audit trail and a counter in replicated tables.
CREATE TRIGGER audit_insert AFTER INSERT ON article BEGIN
    INSERT INTO audit (event, subject) VALUES ('written', NEW.id);
END;
CREATE TRIGGER audit_update AFTER UPDATE OF title, body ON article BEGIN
    INSERT INTO audit (event, subject) VALUES ('edited', NEW.id);
END;
CREATE TRIGGER audit_delete AFTER DELETE ON article BEGIN
    INSERT INTO audit (event, subject) VALUES ('deleted', OLD.id);
END;
CREATE TRIGGER audit_comment_delete AFTER DELETE ON comment BEGIN
    INSERT INTO audit (event, subject) VALUES ('comment gone', OLD.id);
END;
CREATE TRIGGER count_up AFTER INSERT ON comment BEGIN
    UPDATE article SET comments = comments + 1 WHERE id = NEW.article;
END;
CREATE TRIGGER count_down AFTER DELETE ON comment BEGIN
    UPDATE article SET comments = comments - 1 WHERE id = OLD.article;
END;
"""

REPLICATED = ("article", "comment", "audit")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath")


class Application:
    """Edits the articles that it is given, on one node. `events`: what the audit trail must hold because of it."""

    def __init__(self, node: Node, seed: int) -> None:
        self.events: Counter[tuple[str, int]] = Counter()
        self.comments: dict[int, int] = {}  # comment -> article
        self._node = node
        self._dice = random.Random(seed)
        self._next = node.node_id * 1_000_000

    def work(self, steps: int) -> None:
        with self._node.open_db() as db:
            db.execute("PRAGMA foreign_keys = ON")
            for _ in range(steps):
                db.execute("BEGIN IMMEDIATE")
                for _ in range(self._dice.randrange(1, 4)):
                    self._step(db)
                db.execute("COMMIT")

    def _step(self, db: sqlite3.Connection) -> None:
        articles = self._mine(db)
        action = self._dice.choice(("write", "edit", "comment", "comment", "uncomment", "delete"))
        if action == "write" or not articles:
            self._next += 1
            db.execute("INSERT INTO article (id, title, body) VALUES (?, ?, ?)", (self._next, *self._texts()))
            self.events["written", self._next] += 1
            return
        article = self._dice.choice(articles)
        if action == "edit":
            db.execute("UPDATE article SET title = ?, body = ? WHERE id = ?", (*self._texts(), article))
            self.events["edited", article] += 1
        elif action == "comment":
            self._next += 1
            db.execute("INSERT INTO comment VALUES (?, ?, ?)", (self._next, article, self._dice.choice(WORDS)))
            self.comments[self._next] = article
        elif action == "uncomment":
            for comment in [c for c, on in self.comments.items() if on == article][:1]:
                db.execute("DELETE FROM comment WHERE id = ?", (comment,))
                self._gone(comment)
        else:
            db.execute("DELETE FROM article WHERE id = ?", (article,))
            self.events["deleted", article] += 1
            for comment in [c for c, on in self.comments.items() if on == article]:
                self._gone(comment)  # by the cascade, which fires triggers

    def _gone(self, comment: int) -> None:
        self.events["comment gone", comment] += 1
        del self.comments[comment]

    def _mine(self, db: sqlite3.Connection) -> list[int]:
        first = self._node.node_id * 1_000_000
        found = db.execute("SELECT id FROM article WHERE id BETWEEN ? AND ? ORDER BY id", (first, first + 999_999))
        return [number for (number,) in found]

    def _texts(self) -> tuple[str, str]:
        return " ".join(self._dice.sample(WORDS, 2)), " ".join(self._dice.sample(WORDS, 4))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made, _ = hub_and_leaves(tmp_path, SCHEMA, leaves=2)
    with made:
        yield made.start()


def contents(node: Node) -> list[list[tuple[object, ...]]]:
    return [node.execute(f"SELECT * FROM {table} ORDER BY 1") for table in REPLICATED]


def found(node: Node, word: str) -> list[int]:
    return [number for (number,) in node.execute("SELECT rowid FROM search WHERE search MATCH ? ORDER BY rowid", word)]


def wait_identical(cluster: Cluster) -> None:
    nodes = list(cluster.nodes.values())

    def identical() -> bool:
        states = [node.status() for node in nodes]
        return all(each and not each["pending_rows"] for each in states) and all(
            contents(node) == contents(nodes[0]) for node in nodes
        )

    eventually(identical, 30.0, "identical tables on all nodes", pause_s=0.1)


def check_search(cluster: Cluster) -> None:
    """Every node finds what a search without an index finds; FTS5's own check agrees."""
    for node in cluster.nodes.values():
        for word in WORDS:
            plain = node.execute("SELECT id FROM article WHERE title || ' ' || body LIKE ? ORDER BY id", f"%{word}%")
            assert found(node, word) == [number for (number,) in plain], (node.node_id, word)
        node.execute("INSERT INTO search (search, rank) VALUES ('integrity-check', 1)")


def check_counters(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        assert node.execute("PRAGMA foreign_key_check") == []
        wrong = "SELECT id FROM article WHERE comments <> (SELECT count(*) FROM comment WHERE article = article.id)"
        assert node.execute(wrong) == []


def check_audit(cluster: Cluster, applications: list[Application]) -> None:
    """Each event once, on every node."""
    expected: Counter[tuple[str, int]] = Counter()
    for application in applications:
        expected += application.events
    assert len(expected) > 50
    for node in cluster.nodes.values():
        counted = node.execute("SELECT event, subject, count(*) FROM audit GROUP BY event, subject")
        assert {(event, subject): count for event, subject, count in counted} == dict(expected), node.node_id


def test_three_nodes_with_triggers_cascades_and_a_search_index(cluster: Cluster) -> None:
    applications = [Application(node, seed=node.node_id) for node in cluster.nodes.values()]
    three = cluster.nodes[3]
    for _ in range(10):
        for application in applications:
            application.work(5)
    three.stop()
    for application in applications:
        application.work(30)
    three.start()
    for application in applications:
        application.work(20)
    wait_identical(cluster)
    check_search(cluster)
    check_counters(cluster)
    check_audit(cluster, applications)
    assert {len(application.comments) > 0 for application in applications} == {True}


def test_one_node_deletes_what_another_wrote(cluster: Cluster) -> None:
    one, two, three = cluster.nodes.values()
    one.execute("INSERT INTO article (id, title, body) VALUES (1, 'amber', 'birch'), (2, 'cedar', 'delta')")
    one.execute("INSERT INTO comment VALUES (11, 1, 'x'), (12, 1, 'y'), (21, 2, 'z')")
    wait_identical(cluster)
    two.execute("UPDATE article SET body = 'ember' WHERE id = 2")
    with three.open_db() as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("DELETE FROM article WHERE id = 1")
    wait_identical(cluster)
    check_search(cluster)
    check_counters(cluster)
    for node in cluster.nodes.values():
        assert node.execute("SELECT id FROM comment") == [(21,)]
        assert found(node, "ember") == [2] and found(node, "delta") == found(node, "birch") == []
        assert node.execute("SELECT event, subject FROM audit ORDER BY event, subject") == [
            ("comment gone", 11),
            ("comment gone", 12),
            ("deleted", 1),
            ("edited", 2),
            ("written", 1),
            ("written", 2),
        ]
