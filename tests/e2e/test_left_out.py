"""A table that one node leaves out and another replicates: passed over, and there when it is wanted after all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from harmonylite.observe.control import query
from harmonylite.stream.log import LogSettings, api_request
from tests.e2e.cluster import Node, eventually, hub_and_leaves, merged
from tests.e2e.snapshots import save
from tests.stream.logfixture import client

SCHEMA = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE TABLE private (id INTEGER PRIMARY KEY, v);"


def forget_the_beginning(hub: Node) -> None:
    """The log drops all but two messages, as one does that grows beyond its bound."""
    where = query(hub.db, {"command": "snapshot-nats"})

    async def purge() -> None:
        settings = LogSettings(node_id=1, domain=where["domain"])
        async with client(where["url"]) as connection:
            await api_request(connection, settings, f"STREAM.PURGE.{settings.own_stream}", {"keep": 2})

    asyncio.run(purge())


@pytest.mark.slow
@pytest.mark.parametrize("beginning", ["there", "gone"])
def test_a_table_is_left_out_and_wanted_after_all(tmp_path: Path, beginning: str) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = cluster.nodes.values()
    everything = hub.settings
    hub.configure(merged(everything, {"tables": {"exclude": ["private"]}}))
    with cluster:
        cluster.start()
        leaf.execute("INSERT INTO private VALUES (1, 'x')")
        leaf.execute("INSERT INTO t VALUES (1, 'x')")
        eventually(lambda: hub.execute("SELECT v FROM t") == [("x",)], what="the other table's row")
        eventually(lambda: (hub.status() or {})["status"] == "healthy", what="nothing waits")
        assert hub.execute("SELECT * FROM private") == []
        assert (hub.status() or {})["parked_rows"] == 0
        if beginning == "gone":
            for number in (2, 3):
                leaf.execute("INSERT INTO t VALUES (?, 'y')", number)
                eventually(lambda: len(hub.execute("SELECT v FROM t")) == number, what="one more message")  # noqa: B023
                if number == 2:
                    save(hub)  # of no use to who wants the table
            forget_the_beginning(hub)
        assert hub.stop() == 0
        hub.configure(everything)
        hub.start()
        eventually(lambda: hub.execute("SELECT v FROM private") == [("x",)], 90, "the row that was passed over")
        cluster.wait_settled()
        if beginning == "gone":
            assert "it leaves out the table private" in hub.log_text()
