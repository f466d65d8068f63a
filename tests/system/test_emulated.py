"""ARM machines under qemu-user: the packages of their architecture install, run, and replicate with an amd64 hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.appliance import UNIT, Appliance, wait_equal
from tests.system.conftest import Pair
from tests.system.machine import Farm
from tests.system.trees import Tree

pytestmark = pytest.mark.emulated

# Namespaces that qemu-user does not bring about, and a watchdog and start that know no emulation.
_EMULATED = """\
[Service]
PrivateIPC=no
PrivateUsers=no
PrivateNetwork=no
MemoryDenyWriteExecute=no
SystemCallFilter=
SystemCallArchitectures=
CPUQuota=
TimeoutStartSec=300
"""


@pytest.fixture(scope="module", params=["arm64", "armhf"])
def device(request: pytest.FixtureRequest, farm: Farm, pair: Pair, emulated: None) -> Iterator[Appliance]:
    machine = farm.machine(request.param, Tree("bookworm", request.param))
    node = Appliance(machine, {"arm64": 8, "armhf": 9}[request.param])
    node.make_application()
    node.use_repository()
    if request.param == "armhf":  # there Debian's own server serves
        machine.shell("apt-get -y -q --no-install-recommends install /srv/nats-server_*.deb", timeout=120)
    node.apt("install", "harmonylite")
    machine.write(f"/etc/systemd/system/{UNIT}.d/emulated.conf", _EMULATED)
    node.setup("--leaf-servers", f"nats-leaf://{pair.hub.machine.address}:7422")
    node.enable()
    machine.wait(lambda: is_caught_up(node.status()), "it has read the hub's log", 60)
    yield node
    farm.remove(machine)


def is_caught_up(status: dict[str, Any]) -> bool:
    return bool(status["nats_connected"] and status["positions"] and not status["catching_up"])


def test_it_is_of_its_architecture(device: Appliance) -> None:
    machine = device.machine
    assert machine.run("dpkg", "--print-architecture").strip() == machine.tree.architecture
    server = machine.try_run("dpkg-query", "-W", "-f", "${Architecture}", "harmonylite-nats-server")
    assert server.out == ("arm64" if machine.tree.architecture == "arm64" else ""), server
    assert machine.show(UNIT, "ActiveState") == "active"


def test_what_is_written_on_either_side_arrives_on_the_other(pair: Pair, device: Appliance) -> None:
    nodes = (pair.hub, pair.leaf, device)
    device.machine.wait(lambda: len({node.content() for node in nodes}) == 1, "it has what was there before")
    for node in nodes:
        node.start_writing()
    arrived = f"SELECT count(*) > 20 FROM orders WHERE node = '{device.machine.name}'"
    device.machine.wait(lambda: pair.hub.sql(arrived) == "1", "its rows arrive at the hub")
    for node in nodes:
        node.stop_writing()
    wait_equal(*nodes, timeout=60)


def test_restarted_it_goes_on(pair: Pair, device: Appliance) -> None:
    device.machine.systemctl("stop", UNIT)
    device.sql("UPDATE orders SET n = n + 1 WHERE id = (SELECT min(id) FROM orders)")
    pair.hub.sql("INSERT INTO orders SELECT max(id) + 1, 'hub', 0 FROM orders WHERE node = 'hub'")
    device.machine.systemctl("start", UNIT)
    wait_equal(pair.hub, pair.leaf, device, timeout=60)


def test_its_snapshot_is_there_for_all(pair: Pair, device: Appliance) -> None:
    device.machine.run("harmonylite", "snapshot", "save", timeout=120)
    listed = json.loads(pair.hub.machine.run("harmonylite", "snapshot", "list", "--json"))
    assert device.status()["node_id"] in [one["node_id"] for one in listed], listed
