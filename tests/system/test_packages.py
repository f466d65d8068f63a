"""The packages' life: installed, set up, upgraded, removed, installed again, purged; on Debian 12 and 13."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.appliance import CONFIG, UNIT, Appliance
from tests.system.conftest import OLD_VERSION, SMALL
from tests.system.machine import Farm
from tests.system.trees import Tree

SHOP_UNIT = "harmonylite@shop.service"
# What a machine writes by itself while it runs, and what dpkg and apt note about every package.
_MOVING = (
    *("/proc", "/sys", "/run", "/dev", "/tmp", "/var/tmp", "/srv", "/var/log", "/var/cache", SMALL.point),
    *("/var/lib/dpkg", "/var/lib/apt", "/var/lib/systemd", "/var/lib/private"),
)
# The user stays, as Debian's policy has it (a file of it may be left): so do the databases of users and groups.
_USERS = ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow", "/etc/passwd-", "/etc/group-", "/etc/shadow-",
          "/etc/gshadow-", "/etc/subuid", "/etc/subgid")  # fmt: skip


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def fresh(request: pytest.FixtureRequest, farm: Farm) -> Iterator[Appliance]:
    """A machine on which nothing of ours was ever installed, with an application."""
    machine = farm.machine(request.param, Tree(request.param), disks=(SMALL,))
    node = Appliance(machine, 1)
    node.make_application()
    yield node
    farm.remove(machine)


def files(node: Appliance) -> dict[str, str]:
    """Every file, directory and link that is not in flux -> its type, mode, owner and what it holds."""
    prune = " -o ".join(f"-path {path}" for path in _MOVING)
    # Python writes __pycache__ beside modules that root imports; the package must take away its own.
    listed = node.machine.shell(
        f"find / -xdev \\( {prune} \\) -prune -o -printf '%p\\t%y %m %u:%g %l\\n' ; "
        f"find /etc -type f -printf '%p\\t' -exec md5sum {{}} \\; | cut -c -200",
        timeout=120,
    )
    found: dict[str, str] = {}
    for line in listed.splitlines():
        path, _, state = line.partition("\t")
        if path not in _USERS:
            found[path] = found.get(path, "") + state
    return found


@pytest.fixture(scope="module")
def before(fresh: Appliance) -> dict[str, str]:
    return files(fresh)


def version(node: Appliance) -> str:
    return node.machine.run("dpkg-query", "-f", "${Version}", "-W", "harmonylite")


def test_installed_it_waits_to_be_told_what_to_replicate(fresh: Appliance, before: dict[str, str]) -> None:
    fresh.use_repository("/srv/apt-old")
    fresh.apt("install", "harmonylite")
    assert version(fresh) == OLD_VERSION
    assert fresh.machine.show(UNIT, "UnitFileState") == "disabled"
    assert fresh.machine.show(UNIT, "ActiveState") == "inactive"
    # Started without a configuration it says what is missing, once, and stays down.
    failed = fresh.machine.try_run("systemctl", "start", UNIT)
    assert failed.code != 0
    fresh.machine.wait(lambda: fresh.machine.show(UNIT, "ActiveState") == "failed", "it does not try again")
    assert "db_path is not set" in fresh.machine.journal(UNIT)
    fresh.machine.systemctl("reset-failed", UNIT)


def test_upgraded_it_goes_on_with_its_configuration_and_state(fresh: Appliance) -> None:
    machine = fresh.machine
    fresh.setup()
    fresh.set("scan_max_changes", "100")
    shop = Appliance(machine, 2, "/var/lib/shop/shop.db", "shop")
    shop.make_application()
    shop.setup("--instance", "shop")
    for node in (fresh, shop):
        node.enable()
        node.sql("INSERT INTO orders VALUES (1, 'here', 1), (2, 'here', 2)")
        machine.wait(lambda node=node: node.status()["pending_rows"] == 0, "all is sent")
    status = fresh.status()
    configuration = machine.run("cat", CONFIG)
    pids = {node.unit: node.main_pid for node in (fresh, shop)}
    cursor = machine.cursor()
    fresh.start_writing()
    fresh.use_repository("/srv/apt")
    fresh.apt("install", "harmonylite")
    assert version(fresh) != OLD_VERSION
    assert machine.run("cat", CONFIG) == configuration
    for node in (fresh, shop):
        assert machine.show(node.unit, "ActiveState") == "active"
        assert node.main_pid != pids[node.unit]
        assert machine.journal(node.unit, cursor).count("starting version=") == 1, "restarted once"
        node.wait_status()
    after = fresh.status()
    assert (after["node_id"], after["positions"][0]["stream"]) == (status["node_id"], status["positions"][0]["stream"])
    assert after["positions"][0]["sequence"] >= status["positions"][0]["sequence"]
    fresh.stop_writing()
    machine.wait(lambda: fresh.status()["pending_rows"] == 0, "all is sent")


def test_removed_the_application_goes_on_and_installed_again_all_is_sent(fresh: Appliance) -> None:
    machine = fresh.machine
    said = fresh.apt("remove", "harmonylite")
    assert f'"{fresh.database}"' in said and "harmonylite cleanup --all" in said, "what stays, and how to take it out"
    assert machine.pids("nats-server") == ()
    assert machine.try_run("pgrep", "-u", "harmonylite").out == "", "no process is left"
    assert machine.try_run("test", "-e", CONFIG).code == 0, "remove keeps the configuration"
    fresh.sql("INSERT INTO orders VALUES (10, 'meanwhile', 1)")
    fresh.sql("UPDATE orders SET n = 5 WHERE id = 1")
    fresh.apt("install", "harmonylite")
    # It was enabled before.
    assert machine.show(UNIT, "ActiveState") == "active"
    status = fresh.wait_status()
    machine.wait(lambda: fresh.status()["pending_rows"] == 0, "what was written meanwhile is sent")
    assert fresh.status()["published_rows"] >= 2, status


def test_cleaned_up_and_purged_nothing_is_left(fresh: Appliance, before: dict[str, str]) -> None:
    machine = fresh.machine
    shop = Appliance(machine, 2, "/var/lib/shop/shop.db", "shop")
    machine.systemctl("stop", UNIT, SHOP_UNIT)
    for node in (fresh, shop):
        machine.run("harmonylite", "cleanup", "--all", "--config", node.config)
        assert node.sql("SELECT count(*) FROM sqlite_master WHERE name LIKE '%harmonylite%'") == "0"
        node.sql("INSERT INTO orders VALUES (11, 'afterwards', 1)")
    fresh.apt("purge", "harmonylite", "harmonylite-nats-server")
    machine.shell("rm -r /var/lib/shop")
    machine.systemctl("daemon-reload")
    after = files(fresh)
    ours = {"/etc/apt/sources.list.d/harmonylite.list", "/opt/app.py"}
    assert sorted(path for path in after.keys() - before.keys() if path not in ours) == []
    assert sorted(before.keys() - after.keys()) == []
    changed = [path for path in after.keys() & before.keys() if after[path] != before[path]]
    # The folder and the database were given to the group by the administrator, as `setup` said.
    assert [path for path in changed if not path.startswith(fresh.folder)] == []


def test_purged_while_it_runs_nothing_is_left_but_the_triggers(fresh: Appliance, before: dict[str, str]) -> None:
    machine = fresh.machine
    fresh.apt("install", "harmonylite")
    fresh.setup()
    fresh.enable()
    fresh.wait_status()
    fresh.apt("purge", "harmonylite", "harmonylite-nats-server")
    assert machine.try_run("pgrep", "-u", "harmonylite").out == ""
    machine.systemctl("daemon-reload")
    assert machine.try_run("systemctl", "cat", UNIT).code != 0
    new = files(fresh).keys() - before.keys()
    assert sorted(path for path in new if "harmonylite" in path) == ["/etc/apt/sources.list.d/harmonylite.list"]
    fresh.sql("INSERT INTO orders VALUES (12, 'afterwards', 1)")
