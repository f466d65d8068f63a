"""A node whose clock is a year ahead: it takes part, and its rows do not win for ever (docs/rules.md, Clocks)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.cluster import eventually, hub_and_leaves
from tests.e2e.writers import SCHEMA, WRITE, WriterProcess, now_ms, writing
from tests.stream.support import OLD_SERVER, needs_old_server

# Debian's package libfaketime. The Go server asks the kernel directly and is not affected.
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
TOLERANCE_MS = 60_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime (apt-get install libfaketime)"),
]


def clock(offset: str) -> dict[str, str]:
    """The environment of a process whose wall clock is off by `offset`, such as +365d."""
    return {"LD_PRELOAD": str(LIBRARY), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.parametrize("server", [None, pytest.param(OLD_SERVER, marks=needs_old_server)], ids=["today", "old"])
@pytest.mark.parametrize("offset", ["+365d", "-365d"])
def test_a_node_with_a_wrong_clock(tmp_path: Path, offset: str, server: str | None) -> None:
    """It fills the stream, first offline, then online. Edits made on other nodes afterwards win; so do its own.

    old: servers of before 2.10, which have to be asked for the time.
    """
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, more={"nats": {"server_binary": server}} if server else None)
    with cluster:
        hub, wrong, other = cluster.nodes.values()
        wrong.environment = clock(offset)
        writer = WriterProcess(wrong.db, 2, seed=7, pause_ms=5, environment=clock(offset))
        wrong.start()
        eventually(lambda: "capture installed" in wrong.log_text(), 20, "the node captures")
        with writing([writer]):
            time.sleep(4)
            hub.start()
            other.start()
            cluster.start()
            eventually(lambda: other.execute("SELECT count(*) FROM item") > [(100,)], 30, "its rows arrive")
            time.sleep(4)
        cluster.wait_settled()
        status = wrong.status()
        assert status is not None and status["clock_offset_seconds"] is not None
        assert abs(abs(status["clock_offset_seconds"]) - 365 * 86_400) < 10
        limit = now_ms() + TOLERANCE_MS + 1_000
        for node in (hub, wrong, other):
            [(newest,)] = node.execute("SELECT max(ts) FROM __harmonylite__item_version")
            assert newest <= limit, f"a version {(newest - limit) / 1000:.0f} s beyond what is allowed"
        keys = [key for (key,) in other.execute("SELECT id FROM item ORDER BY id")]
        for number, key in enumerate(keys):
            other.execute(WRITE, key, 3, number, "edited elsewhere")
        cluster.wait_settled()
        for node in (hub, wrong, other):
            assert node.execute("SELECT count(*) FROM item WHERE node = 3") == [(len(keys),)]
        done = len(writer.writes())
        again = WriterProcess(wrong.db, 2, seed=8, environment=clock(offset))
        with writing([again]):
            time.sleep(3)
        cluster.wait_settled()
        last = {write.key: write for write in again.writes()[done:]}
        assert len(last) > 20
        for key, write in last.items():
            found = hub.execute("SELECT node, sequence FROM item WHERE id = ?", key)
            assert found == ([] if write.deleted else [(2, write.sequence)]), f"{write} became {found}"
        print(f"{offset}: {len(keys)} rows edited elsewhere won everywhere; then {len(last)} edits of its own did")
