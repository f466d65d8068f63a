"""Numbers of groups, by which receivers tell the parts of one group from those of another (docs/rules.md, Publish)."""

from __future__ import annotations

from tests.db.conftest import MakeNode
from tests.db.harness import Node
from tests.db.snapshots import copy_of


def test_a_restored_backup_uses_no_number_again(make: MakeNode) -> None:
    """The backup knows only what was given out before it was made; time tells that there was more."""
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    numbers: list[int] = []

    def publish(publisher: Node) -> None:
        publisher.clock.tick(1_000)
        publisher.sql("INSERT INTO t (v) VALUES ('x')")
        numbers.extend(group.number for group in publisher.publish())

    publish(node)
    backup, _ = copy_of(node, "backup.db")
    for _ in range(3):
        node.restart()
        publish(node)
    node.clock.tick(1_000)
    restored = Node(backup, 1, clock=node.clock).start()
    try:
        publish(restored)
    finally:
        restored.stop()
        restored.app.close()
    assert len(numbers) == 5
    assert numbers == sorted(set(numbers))
