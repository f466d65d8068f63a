"""Installed from the repository and supervised by systemd: a hub (Debian 12) and a leaf (Debian 13), one story.

Each test leaves the two replicating, and starts from there.
"""

from __future__ import annotations

import itertools
import re
import time

import pytest

from tests.system.appliance import CONFIG, FOLDER, UNIT, Appliance, wait_equal
from tests.system.conftest import Pair

NODES = ("hub", "leaf")


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest, pair: Pair) -> Appliance:
    found: Appliance = getattr(pair, request.param)
    return found


def write_on_both(pair: Pair, rows: int = 20) -> None:
    """The applications write beside each other; everything arrives at both."""
    before = pair.hub.rows()
    for one in pair.both:
        one.start_writing()
    pair.hub.machine.wait(lambda: pair.hub.rows() >= before + rows, "the applications write and the rows arrive")
    written = sum(one.stop_writing() for one in pair.both)
    content = wait_equal(*pair.both)
    assert content.count("\n") + 1 == written


def test_what_applications_write_arrives_at_the_other_machine(pair: Pair) -> None:
    write_on_both(pair)
    # Changes and deletes, too.
    row = pair.hub.sql("SELECT max(id) FROM orders WHERE node = 'hub'")
    pair.leaf.sql(f"UPDATE orders SET n = -1 WHERE id = {row}; DELETE FROM orders WHERE id = {row} - 1")
    wait_equal(*pair.both)
    assert pair.hub.sql(f"SELECT id, n FROM orders WHERE id BETWEEN {row} - 1 AND {row}") == f"{row}|-1"
    # So that later tests may count rows by who wrote them.
    pair.hub.sql(f"INSERT INTO orders VALUES ({row} - 1, 'hub', 0)")
    wait_equal(*pair.both)


def test_the_unit_is_supervised_limited_and_confined(node: Appliance) -> None:
    machine = node.machine
    assert machine.show(UNIT, "Type") == "notify"
    assert machine.show(UNIT, "ActiveState") == "active"
    assert int(machine.show(UNIT, "WatchdogUSec").removesuffix("min")) > 0
    machine.wait(lambda: machine.show(UNIT, "StatusText").startswith("online"), "STATUS says online", 30)
    # Limits cannot be enforced in every container, so this looks at what was asked for.
    for limit in ("MemoryMax", "MemoryHigh", "TasksMax", "CPUQuotaPerSecUSec"):
        assert machine.show(UNIT, limit) not in ("infinity", ""), limit
    assert "network-online.target" not in machine.show(UNIT, "After"), "boot would wait for a network"
    state = machine.shell(f"cat /proc/{node.main_pid}/status")
    facts = dict(re.findall(r"^(\w+):\s+(.*)$", state, re.MULTILINE))
    uid = machine.run("id", "-u", "harmonylite").strip()
    assert facts["Uid"].split() == [uid] * 4
    assert (facts["NoNewPrivs"], int(facts["CapEff"], 16), facts["Seccomp"]) == ("1", 0, "2")
    owner = machine.shell("ps -o user= -p $(pgrep -x nats-server)").strip()
    assert owner == "harmonylite"


def test_systemd_finds_no_fault_with_the_units(node: Appliance) -> None:
    machine = node.machine
    units = [UNIT, "harmonylite@.service"]
    verified = machine.try_run(
        "systemd-analyze", "verify", "--man=no", *(f"/lib/systemd/system/{unit}" for unit in units)
    )
    # Keys that only newer versions know are ignored by older ones, which say so.
    complaints = [
        line
        for line in verified.err.splitlines()
        if "harmonylite" in line and not re.search(r"Unknown key( name)? 'Restart(Steps|MaxDelaySec)'", line)
    ]
    assert (verified.code, complaints) == (0, [])
    exposure = machine.run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    found = re.search(r"exposure level for harmonylite\.service: ([\d.]+)", exposure)
    assert found and float(found[1]) <= 1.5, exposure


def test_status_is_for_root_and_for_who_may_read_the_database(node: Appliance) -> None:
    machine = node.machine
    for user in ("root", "harmonylite", "app"):
        assert "daemon    running" in re.sub(" +", "    ", machine.run("harmonylite", "status", user=user)), user
    machine.run("chmod", "o-rwx", FOLDER)
    refused = machine.try_run("harmonylite", "status", user="nobody")
    machine.run("chmod", "o+rx", FOLDER)
    assert (refused.code, refused.err.count("\n")) == (1, 1), refused


def test_doctor_finds_a_permission_that_is_taken_away(node: Appliance) -> None:
    machine = node.machine
    doctor = machine.try_run("harmonylite", "doctor")
    lines = [line for line in doctor.out.splitlines() if line.startswith("fail")]
    assert (doctor.code, lines) == (0, []), doctor.out
    assert f"{UNIT} may use the database, as harmonylite and group app" in doctor.out
    machine.run("chmod", "g-w", FOLDER)
    doctor = machine.try_run("harmonylite", "doctor")
    assert doctor.code == 1
    assert f"chmod g+rwxs {FOLDER}" in doctor.out
    machine.run("chmod", "g+w", FOLDER)


def test_reload_takes_over_the_logging(node: Appliance) -> None:
    machine = node.machine
    before, cursor = node.main_pid, machine.cursor()
    node.set("verbose", "true")
    machine.systemctl("reload", UNIT)
    machine.wait(lambda: "reloaded" in machine.journal(UNIT, cursor), "it says so")
    assert node.main_pid == before
    machine.shell(f"sed -i 's/^verbose = true/# verbose = false/' {CONFIG}")
    machine.systemctl("reload", UNIT)


def test_stopped_the_application_goes_on_and_started_all_is_sent(pair: Pair) -> None:
    leaf = pair.leaf
    leaf.start_writing()
    leaf.machine.systemctl("stop", UNIT)
    assert (leaf.machine.pids("nats-server"), leaf.machine.show(UNIT, "Result")) == ((), "success")
    before = leaf.rows()
    leaf.machine.wait(lambda: leaf.rows() > before + 10, "the application writes on")
    leaf.machine.systemctl("start", UNIT)
    leaf.stop_writing()
    wait_equal(*pair.both)


def test_killed_it_is_started_again(pair: Pair, node: Appliance) -> None:
    machine = node.machine
    node.start_writing()
    before = node.main_pid
    machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", UNIT)
    machine.wait(lambda: machine.show(UNIT, "ActiveState") == "active" and node.main_pid not in (0, before), "restart")
    machine.wait(lambda: len(machine.pids("nats-server")) == 1, "a new server, and the old one died with its daemon")
    node.wait_status()
    node.stop_writing()
    wait_equal(*pair.both)


def test_killed_again_and_again_it_is_started_further_and_further_apart(node: Appliance) -> None:
    """With systemd 252 (the hub) the daemon waits itself; 254 and newer (the leaf) pause longer each time."""
    machine = node.machine
    machine.systemctl("restart", UNIT)
    begun: list[float] = []

    def kill() -> None:
        before = node.main_pid
        machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", UNIT)
        machine.wait(lambda: node.main_pid not in (0, before), "another process", 90)

    def ready() -> None:
        machine.wait(lambda: machine.show(UNIT, "SubState") == "running", "it is ready", 90)
        begun.append(float(machine.show(UNIT, "ActiveEnterTimestampMonotonic")) / 1e6)

    cursor = machine.cursor()
    ready()
    for _ in range(3):
        kill()
        ready()
    apart = [later - earlier for earlier, later in itertools.pairwise(begun)]
    assert all(longer > shorter + 1.5 for shorter, longer in itertools.pairwise(apart)), apart
    assert apart[0] > 4 and apart[2] > 10, apart
    if machine.tree.suite != "bookworm":
        return
    assert [line for line in machine.journal(UNIT, cursor).splitlines() if "ended badly" in line][-1].find(
        "bad_ends=3"
    ) > 0
    # The service is told while it waits, does not count as started, and a stop is answered at once.
    kill()
    machine.wait(lambda: machine.show(UNIT, "StatusText").startswith("waiting "), "STATUS says that it waits", 30)
    assert machine.show(UNIT, "ActiveState") == "activating"
    assert machine.pids("nats-server") == ()
    before = time.monotonic()
    machine.systemctl("restart", UNIT)
    assert time.monotonic() - before < 5, "a restart by hand is not made to wait"
    assert machine.show(UNIT, "SubState") == "running"
    kill()
    ready()
    assert begun[-1] - begun[-2] > 0
    machine.systemctl("stop", UNIT)
    assert machine.try_run("test", "-e", "/run/harmonylite").code != 0, "nothing is left of a service that was stopped"
    machine.systemctl("start", UNIT)
    node.wait_status()


def test_a_killed_server_is_started_again_by_the_daemon(pair: Pair, node: Appliance) -> None:
    machine = node.machine
    daemon, (server,) = node.main_pid, machine.pids("nats-server")
    machine.run("kill", "-9", str(server))
    machine.wait(lambda: machine.pids("nats-server") not in ((), (server,)), "another server")
    write_on_both(pair)
    assert node.main_pid == daemon
    node.wait_status()


def test_a_frozen_daemon_is_restarted_by_the_watchdog(pair: Pair, node: Appliance) -> None:
    machine = node.machine
    drop_in = f"/run/systemd/system/{UNIT}.d/test.conf"
    machine.write(drop_in, "[Service]\nWatchdogSec=3\nRestartSec=0\n")
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", UNIT)
    before, cursor = node.main_pid, machine.cursor()
    machine.run("kill", "-STOP", str(before))
    machine.wait(lambda: node.main_pid not in (0, before), "it is restarted", 20)
    machine.wait(lambda: machine.show(UNIT, "ActiveState") == "active", "it is ready again")
    assert "Watchdog timeout" in machine.journal(UNIT, cursor)
    machine.wait(lambda: len(machine.pids("nats-server")) == 1, "a new server, and none is left over")
    machine.run("rm", drop_in)
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", UNIT)
    for one in pair.both:
        one.wait_status()
    write_on_both(pair)


def test_after_a_reboot_all_goes_on(pair: Pair, node: Appliance) -> None:
    node.sql(f"INSERT INTO orders VALUES ({node.number}, '{node.machine.name}', 1)")
    node.machine.reboot()
    assert node.machine.show(UNIT, "ActiveState") == "active"
    node.wait_status()
    wait_equal(*pair.both)
    write_on_both(pair)


def test_after_a_power_cut_nothing_that_was_committed_is_missing(pair: Pair, node: Appliance) -> None:
    node.start_writing()
    before = node.rows()
    node.machine.wait(lambda: node.rows() > before + 20, "the application writes")
    last = node.rows()
    node.machine.cut_power()
    node.machine.start()
    node.wait_status()
    content = wait_equal(*pair.both)
    assert content.count("\n") + 1 >= last
    assert node.sql("PRAGMA integrity_check") == "ok"
