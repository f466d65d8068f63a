"""ARM machines under qemu-user: the packages of their architecture install, run, and replicate with an amd64 hub.

armel stands for armv6 (Pi 1, Pi Zero): Debian's programs for it run on the processor of these, and the daemon and its
server get nothing more than that processor. Raspberry Pi OS brings the same programs, built for armv6.
"""

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


_ARMV6 = "QEMU_CPU=arm1176"
_NUMBERS = {"arm64": 8, "armhf": 9, "armel": 10}


@pytest.fixture(scope="module", params=_NUMBERS)
def device(request: pytest.FixtureRequest, farm: Farm, pair: Pair, emulated: None) -> Iterator[Appliance]:
    machine = farm.machine(request.param, Tree("bookworm", request.param))
    node = Appliance(machine, _NUMBERS[request.param])
    node.make_application()
    # The package is the same for all; what the repository has for armhf is what a Pi 1 finds there, too.
    node.use_repository(options="arch=armhf" if request.param == "armel" else "")
    if request.param != "arm64":  # there Debian's own server serves
        machine.shell("apt-get -y -q --no-install-recommends install /srv/nats-server_*.deb", timeout=120)
    node.apt("install", "harmonylite")
    processor = f"Environment={_ARMV6}\n" if request.param == "armel" else ""
    machine.write(f"/etc/systemd/system/{UNIT}.d/emulated.conf", _EMULATED + processor)
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
    if machine.tree.architecture == "armel":
        assert machine.run("env", _ARMV6, "uname", "-m").strip() == "armv6l"
        pids = machine.run("pgrep", "-u", "harmonylite").split()
        assert len(pids) == 2, "the daemon and its server"
        for pid in pids:
            assert _ARMV6 in machine.shell(f"tr '\\0' '\\n' </proc/{pid}/environ").split("\n")


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


def test_its_snapshot_is_there_for_all_and_opens_on_either_architecture(pair: Pair, device: Appliance) -> None:
    node_id, content = device.status()["node_id"], wait_equal(pair.hub, pair.leaf, device, timeout=60)
    device.machine.run("harmonylite", "snapshot", "save", timeout=120)
    taken: set[str] = set()
    for node in (device, pair.hub):
        machine = node.machine
        listed = json.loads(machine.run("harmonylite", "snapshot", "list", "--json"))
        [newest] = [one for one in listed if one["node_id"] == node_id]
        taken.add(newest["id"])
        copy = f"{node.folder}/copy.db"
        machine.run("harmonylite", "snapshot", "restore", "--id", newest["id"], "--to", copy, timeout=120)
        assert machine.run("sqlite3", copy, "PRAGMA integrity_check").strip() == "ok"
        assert machine.run("sqlite3", copy, "SELECT id, node, n FROM orders ORDER BY id").strip() == content
        # A copy for people: nothing of ours is in it, and any program may write to it.
        assert (
            machine.run("sqlite3", copy, "SELECT count(*) FROM sqlite_master WHERE name LIKE '%harmonylite%'") == "0\n"
        )
        machine.run("sqlite3", copy, "INSERT INTO orders VALUES (0, 'copy', 0)")
        machine.run("rm", copy)
    assert len(taken) == 1
