"""What the outside does to a device: no network, a wrong clock, a full disk, a card that turns read-only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.appliance import UNIT, Appliance, wait_equal
from tests.system.conftest import SMALL, Pair

YEAR_S = 365 * 86400
SMALL_UNIT = "harmonylite@small.service"


def test_without_network_it_works_and_with_it_all_arrives(pair: Pair) -> None:
    """For two minutes: longer than any keep-alive on the way."""
    leaf = pair.leaf
    leaf.machine.unplug()
    for node in pair.both:
        node.start_writing()
    leaf.machine.wait(lambda: not leaf.status()["nats_connected"], "it notices", 60)
    assert leaf.wait_status("degraded")["reasons"]
    leaf.machine.wait(lambda: leaf.status()["pending_rows"] > 2200, "rows wait for the network", 400)  # 20 a second
    assert leaf.machine.show(UNIT, "ActiveState") == "active"
    leaf.machine.wait(lambda: leaf.machine.show(UNIT, "StatusText").startswith("offline"), "STATUS says offline", 30)
    leaf.machine.plug()
    leaf.wait_status("healthy", 60)
    for node in pair.both:
        node.stop_writing()
    wait_equal(*pair.both, timeout=60)


def test_ready_after_a_boot_without_network(pair: Pair) -> None:
    leaf = pair.leaf
    leaf.machine.unplug()
    leaf.machine.reboot()
    assert leaf.machine.show(UNIT, "ActiveState") == "active", "READY needs no network"
    leaf.sql("INSERT INTO orders VALUES (2001, 'leaf', 1)")
    leaf.machine.wait(lambda: leaf.status()["pending_rows"] == 1, "the change waits")
    leaf.machine.plug()
    leaf.wait_status("healthy", 60)
    wait_equal(*pair.both)


def test_a_hub_that_is_away_for_a_while_gets_everything(pair: Pair) -> None:
    pair.hub.machine.cut_power()
    pair.leaf.start_writing()
    pair.leaf.wait_status("degraded", 60)
    pair.hub.machine.start()
    pair.leaf.wait_status("healthy", 60)
    pair.leaf.stop_writing()
    wait_equal(*pair.both)


def test_a_clock_a_year_back_at_boot(pair: Pair) -> None:
    """A device without a battery for its clock: application and daemon see last year until NTP comes."""
    hub, leaf = pair.both
    leaf.machine.unplug()
    library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
    drop_in = (
        f"[Service]\nEnvironment=LD_PRELOAD={library} FAKETIME=-{YEAR_S}s FAKETIME_DONT_FAKE_MONOTONIC=1"
        " FAKETIME_NO_CACHE=1\n"
    )
    for unit in (UNIT, "app.service"):
        leaf.machine.write(f"/etc/systemd/system/{unit}.d/clock.conf", drop_in)
    leaf.machine.reboot()
    leaf.start_writing()
    leaf.machine.wait(lambda: leaf.status()["pending_rows"] > 20, "changes are captured")
    # Written there while the device was away, to a row that the device had: the later write, whatever clocks say.
    row = hub.sql("SELECT min(id) FROM orders")
    hub.sql(f"UPDATE orders SET n = 77 WHERE id = {row}")
    leaf.machine.plug()
    leaf.machine.wait(lambda: leaf.status()["pending_rows"] < 5, "they are sent", 60)
    status = leaf.status()
    assert status["clock_offset_seconds"] is not None and abs(status["clock_offset_seconds"] + YEAR_S) < 3600, status
    leaf.stop_writing()
    wait_equal(hub, leaf)
    # Written by the device with the wrong clock, after it has seen the hub's write: it must win (I6).
    assert leaf.sql(f"SELECT n FROM orders WHERE id = {row}") == "77"
    leaf.machine.run(
        *("env", f"LD_PRELOAD={library}", f"FAKETIME=-{YEAR_S}s", "FAKETIME_DONT_FAKE_MONOTONIC=1"),
        *("sqlite3", leaf.database, f"UPDATE orders SET n = 78 WHERE id = {row}"),
        user="app",
    )
    hub.machine.wait(lambda: hub.sql(f"SELECT n FROM orders WHERE id = {row}") == "78", "the device's write wins")
    # The clock is set right: restarts, and all goes on.
    leaf.machine.run("rm", *(f"/etc/systemd/system/{unit}.d/clock.conf" for unit in (UNIT, "app.service")))
    leaf.machine.systemctl("daemon-reload")
    leaf.machine.systemctl("restart", UNIT)
    status = leaf.wait_status("healthy", 60)
    leaf.sql(f"UPDATE orders SET n = 79 WHERE id = {row}")
    wait_equal(hub, leaf)
    assert hub.sql(f"SELECT n FROM orders WHERE id = {row}") == "79"


@pytest.fixture(scope="module")
def small(pair: Pair) -> Iterator[Appliance]:
    """A further database on the leaf's small card, with an instance of its own."""
    machine = pair.leaf.machine
    node = Appliance(machine, 3, f"{SMALL.point}/app/app.db", "small")
    node.make_application()
    node.setup("--instance", "small")
    node.enable()
    node.wait_status()
    yield node
    machine.systemctl("disable", "--now", SMALL_UNIT)


def test_a_full_disk_stops_neither_the_unit_nor_what_comes_after(small: Appliance) -> None:
    machine = small.machine
    small.sql("INSERT INTO orders VALUES (1, 'leaf', 1)")
    machine.wait(lambda: small.status()["pending_rows"] == 0, "it is sent")
    for size in ("64k", "1k"):
        machine.try_run("dd", "if=/dev/zero", f"of={SMALL.point}/filler-{size}", f"bs={size}")
    assert machine.shell(f"df --output=avail {SMALL.point} | tail -1").strip() == "0"
    big = "INSERT INTO orders SELECT value + 1000, 'leaf', value FROM generate_series(1, 20000)"
    failed = machine.try_run("sqlite3", small.database, big, user="app")
    assert failed.code != 0 and "full" in failed.err
    pid = small.main_pid
    status = small.wait_status("unhealthy", 60) if small.status()["status"] == "unhealthy" else small.status()
    assert machine.show(SMALL_UNIT, "ActiveState") == "active", status
    machine.shell(f"rm {SMALL.point}/filler-*")
    small.sql(big)
    small.wait_status("healthy", 60)
    machine.wait(lambda: small.status()["pending_rows"] == 0, "all is sent", 60)
    assert small.rows() == 20001
    assert small.main_pid == pid, "the daemon lived through it"


def test_a_card_that_turns_read_only_is_told_and_mended_by_a_check(small: Appliance) -> None:
    machine = small.machine
    cursor = machine.cursor()
    machine.break_disk(SMALL)
    # At rest, before anybody wants to write.
    [reason] = small.wait_status("unhealthy")["reasons"]
    assert f"the file system of {SMALL.point}/app is read-only" in reason
    assert machine.show(SMALL_UNIT, "StatusText").startswith("unhealthy: the file system of ")
    assert "the database's file system is read-only; nothing can be written" in machine.journal(SMALL_UNIT, cursor)
    assert "Read-only file system" in machine.try_run("touch", f"{SMALL.point}/x").err
    failed = machine.try_run("sqlite3", small.database, "INSERT INTO orders VALUES (5, 'leaf', 5)", user="app")
    assert failed.code != 0
    doctor = machine.try_run("harmonylite", "doctor", "--config", small.config)
    assert doctor.code == 1 and "read-only" in doctor.out, doctor.out
    assert machine.show(SMALL_UNIT, "ActiveState") == "active"
    machine.stop()
    machine.check_disk(SMALL)
    machine.start()
    small.wait_status()
    small.sql("INSERT INTO orders VALUES (5, 'leaf', 5)")
    machine.wait(lambda: small.status()["pending_rows"] == 0, "it is sent")
    assert small.sql("PRAGMA integrity_check") == "ok"


def test_a_leaf_on_a_root_that_is_read_only(pair: Pair) -> None:
    """As with an overlay or a read-only root: the database on a partition of its own, our folders in memory."""
    machine = pair.leaf.machine
    node = Appliance(machine, 6, f"{SMALL.point}/ro/app.db", "ro")
    node.make_application()
    node.setup("--instance", "ro", "--leaf-servers", f"nats-leaf://{pair.hub.machine.address}:7422")
    machine.systemctl("enable", node.unit)
    folders = ("/var/lib/harmonylite", "/var/cache/harmonylite")
    machine.write("/etc/fstab", "".join(f"tmpfs {folder} tmpfs mode=0755,size=8m 0 0\n" for folder in folders))
    machine.read_only = True
    machine.reboot()
    try:
        assert "Read-only" in machine.try_run("touch", "/etc/x").err
        node.wait_status()
        node.sql("INSERT INTO orders VALUES (1, 'ro', 1)")
        machine.wait(lambda: node.status()["pending_rows"] == 0, "the hub has it")
        assert int(machine.shell(f"du -sk {folders[0]}/ro").split()[0]) < 100, "a leaf stores next to nothing there"
    finally:
        machine.read_only = False
        machine.reboot()
        machine.shell(f"systemctl disable --now {node.unit}; rm /etc/fstab; umount {' '.join(folders)}")
