"""Nodes are upgraded one after the other, and the new version writes what the old one cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmonylite.observe.control import ControlError, ControlFailed, query
from tests.e2e.cluster import Node, eventually, hub_and_leaves
from tests.e2e.snapshots import SCHEMA, save
from tests.e2e.writers import WRITE

# A version to come: it writes groups of format 2, and reads both. Loaded before anything of HarmonyLite.
NEXT_VERSION = """
import harmonylite
harmonylite.__version__ = "99.0.0"
from harmonylite.wire import groups
groups._PREFIX_PLAIN, groups._PREFIX_COMPRESSED = bytes((2, 0)), bytes((2, 1))
decompress = groups._decompress
groups._decompress = lambda data, most: decompress(
    memoryview(bytes((1,)) + bytes(data[1:])) if data[0] == 2 else data, most
)
"""


def reasons(node: Node) -> str:
    found = node.status()
    return "; ".join(found["reasons"]) if found else ""


@pytest.mark.slow
def test_what_the_old_version_could_not_read_takes_effect_after_its_upgrade(tmp_path: Path) -> None:
    """Until then that node takes no snapshot, which would hide the hole from all who merge it."""
    cluster, _ = hub_and_leaves(tmp_path / "nodes", SCHEMA, 1)
    hub, leaf = cluster.nodes[1], cluster.nodes[2]
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "sitecustomize.py").write_text(NEXT_VERSION)
    with cluster:
        cluster.start()
        hub.execute(WRITE, "old", 1, 1, "")
        cluster.wait_settled(30)
        leaf.stop()
        leaf.environment = {"PYTHONPATH": str(newer)}
        leaf.start()
        eventually(lambda: leaf.settled() and (leaf.status() or {})["version"] == "99.0.0", 20, "the leaf is upgraded")
        leaf.execute(WRITE, "new", 2, 1, "x" * 100)
        leaf.execute("DELETE FROM item WHERE id = 'old'")
        eventually(lambda: "could not be read by this version" in reasons(hub), 20, "the hub says so")
        with pytest.raises((ControlError, ControlFailed), match="upgrade this node"):
            query(hub.db, {"command": "snapshot-save", "force": False})
        hub.execute(WRITE, "of the old version", 1, 2, "")
        eventually(lambda: leaf.execute("SELECT count(*) FROM item") == [(2,)], 20, "the new version reads the old one")
        assert hub.execute("SELECT id FROM item ORDER BY id") == [("of the old version",), ("old",)]
        hub.stop()
        hub.environment = leaf.environment
        hub.start()
        cluster.wait_settled(30)
        assert hub.execute("SELECT id FROM item ORDER BY id") == [("new",), ("of the old version",)]
        assert hub.execute("SELECT count(*) FROM __harmonylite__unread") == [(0,)]
        eventually(lambda: reasons(hub) == "", 20, "the hub is complete")
        save(hub)
