"""What a leaf logs of its link to the hub: one line when it goes, one when it is back, few when it flaps."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from harmonylite.stream.server_config import ServerSettings
from harmonylite.stream.server_log import HubLink, ServerLog
from tests.stream.support import bundled, eventually, free_port

HUB = "nats-leaf://u:secret@hub:7422"
DIALLED = b"[7] [INF] hub:7422 - lid:5 - Leafnode connection created for account: $G\n"
UP = b'[7] [INF] JetStream using domains: local "", remote "hub"\n'
HUNG_UP = b"[7] [INF] hub:7422 - lid:5 - Leafnode connection closed: Client Closed - Remote: harmonylite-node-1\n"
REFUSED = b'[7] [ERR] Error trying to connect as leafnode to remote server "hub:7422" (attempt 1): connection refused\n'


class Leaf:
    """One server's output, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.link = HubLink((HUB,), clock=lambda: self.now)
        self.said = ServerLog()

    def says(self, *lines: bytes) -> None:
        for line in lines:
            self.said.feed(line)
            self.link.follow(self.said)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str, dict[str, Any]]]:
    return [
        (record.levelno, record.getMessage(), cast(Any, record).fields)
        for record in caplog.records
        if "the hub" in record.getMessage()
    ]


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "harmonylite")


def test_one_line_when_it_goes_and_one_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    leaf = Leaf()
    leaf.says(DIALLED, UP)
    leaf.now += 100
    leaf.says(HUNG_UP, REFUSED, REFUSED.replace(b"attempt 1", b"attempt 2"))
    leaf.now += 40
    leaf.says(DIALLED, UP)
    begun, lost, back = told(caplog)
    assert begun == (logging.INFO, "connected to the hub", {"hub": HUB})
    assert lost[:2] == (logging.WARNING, "connection to the hub lost; changes wait until it is back")
    assert lost[2] == {"hub": HUB, "error": "the connection to the hub was lost (Client Closed)"}
    assert back == (logging.INFO, "connected to the hub", {"hub": HUB, "after_s": 40.0})
    # The server's own words for the same event are not a second warning.
    assert not [r for r in caplog.records if "closed" in str(cast(Any, r).fields.get("text"))]


def test_a_hub_that_was_never_there(caplog: pytest.LogCaptureFixture) -> None:
    leaf = Leaf()
    leaf.says(REFUSED)
    [(level, event, fields)] = told(caplog)
    assert (level, event) == (logging.WARNING, "no connection to the hub; changes wait until it is back")
    assert "connection refused" in fields["error"]


def test_a_server_that_starts_again_is_no_news_of_the_hub(caplog: pytest.LogCaptureFixture) -> None:
    leaf = Leaf()
    leaf.says(DIALLED, UP)
    leaf.said = ServerLog()
    leaf.says(DIALLED)  # not accepted yet: nothing is known
    leaf.says(UP)
    assert len(told(caplog)) == 1


def test_a_link_that_flaps_is_told_a_few_times_and_its_end_for_certain(caplog: pytest.LogCaptureFixture) -> None:
    leaf = Leaf()
    leaf.says(DIALLED, UP)
    for _ in range(30):
        leaf.now += 1
        leaf.says(HUNG_UP, DIALLED, UP)
    leaf.now += 1
    leaf.says(HUNG_UP)
    assert len(told(caplog)) == 4
    leaf.now += 60
    leaf.link.follow(leaf.said)
    assert told(caplog)[-1][0] == logging.WARNING


def test_real_servers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()

    def node(node_id: int, **more: Any) -> ServerSettings:
        folder = tmp_path / f"node{node_id}"
        return ServerSettings(node_id=node_id, data_dir=folder, bind_address="127.0.0.1:-1", **more)

    async def main() -> None:
        hub = node(1, leaf_listen=f"127.0.0.1:{port}")
        async with bundled(node(2, leaf_servers=(f"127.0.0.1:{port}",))):
            await eventually(lambda: len(told(caplog)) == 1, what="no hub yet")
            async with bundled(hub):
                await eventually(lambda: len(told(caplog)) == 2, what="the hub is there")
            await eventually(lambda: len(told(caplog)) == 3, what="the hub is gone")
            async with bundled(hub):
                await eventually(lambda: len(told(caplog)) == 4, what="the hub is back")
        # Our own end is not the hub's.
        assert len(told(caplog)) == 4

    asyncio.run(main())
    assert [(level, event.partition(";")[0]) for level, event, _ in told(caplog)] == [
        (logging.WARNING, "no connection to the hub"),
        (logging.INFO, "connected to the hub"),
        (logging.WARNING, "connection to the hub lost"),
        (logging.INFO, "connected to the hub"),
    ]
