"""`harmonylite setup` where applications keep their databases, and whether what it writes is enough for the unit."""

from __future__ import annotations

import pytest

from tests.system.appliance import Appliance
from tests.system.conftest import Pair


def test_a_database_in_a_home_that_is_closed_to_others(pair: Pair) -> None:
    """As on Raspberry Pi OS: /home/pi is for pi alone. The service sees the one directory, and nothing else of it."""
    machine = pair.hub.machine
    machine.shell(
        "useradd --create-home pi; chmod 0700 /home/pi; echo secret >/home/pi/secret; chmod 0666 /home/pi/secret"
    )
    node = Appliance(machine, 4, "/home/pi/my app/app.db", "home", user="pi")
    node.make_application()
    commands = node.setup("--instance", "home")
    assert commands == ["chmod g+rwxs '/home/pi/my app'", "chmod g+rw '/home/pi/my app/app.db'"]
    node.enable()
    node.wait_status()
    node.sql("INSERT INTO orders VALUES (1, 'pi', 1)")
    machine.wait(lambda: node.status()["pending_rows"] == 0, "the change is sent")
    seen = machine.path("")  # the machine as a whole; the unit's own view is below
    assert (seen / "home/pi/secret").exists()
    view = f"/proc/{node.main_pid}/root/home/pi"
    assert machine.run("ls", view).split("\n") == ["my app", ""]
    doctor = machine.run("harmonylite", "doctor", "--config", node.config)
    assert "harmonylite@home.service may use the database, as harmonylite and group pi" in doctor
    machine.systemctl("disable", "--now", node.unit)


@pytest.mark.parametrize("mode", ["0755", "0700"])
def test_doctor_says_what_setup_would_mend(pair: Pair, mode: str) -> None:
    machine = pair.leaf.machine
    name = f"mode{mode}"
    node = Appliance(machine, 5, f"/srv/{name}/app.db", name)
    node.make_application(mode)
    machine.write(node.config, f'db_path = "{node.database}"\n')
    doctor = machine.try_run("harmonylite", "doctor", "--config", node.config)
    assert doctor.code == 1
    advice = f"harmonylite setup --db {node.database} --instance {name}"
    assert f"harmonylite@{name}.service may not write in /srv/{name}" in doctor.out and advice in doctor.out
    # A service that is started all the same says so in its log, and is not READY for nothing.
    commands = node.setup("--instance", name)
    assert f"chmod g+rwxs /srv/{name}" in commands
    node.enable()
    node.wait_status()
    # The application and the daemon may both open what the other creates.
    owners = machine.shell(f"stat -c '%n %U %G %a' {node.database}-wal {node.database}-shm").splitlines()
    assert {tuple(line.split()[2:]) for line in owners} <= {("app", "664"), ("app", "660")}, owners
    machine.systemctl("stop", node.unit)
    machine.shell(f"rm -f {node.database}-wal {node.database}-shm")
    machine.systemctl("start", node.unit)
    node.sql("INSERT INTO orders VALUES (1, 'x', 1)")
    machine.wait(lambda: node.status()["pending_rows"] == 0, "the change is sent")
    machine.systemctl("disable", "--now", node.unit)


def test_two_instances_without_node_ids_are_two_nodes_for_the_hub(pair: Pair) -> None:
    """As their configurations are written by hand; the hub refuses a second server of one name."""
    machine = pair.leaf.machine
    nodes = [Appliance(machine, 7, f"/srv/{name}/app.db", name) for name in ("east", "west")]
    for node in nodes:
        node.make_application()
        node.setup("--instance", node.folder[5:], "--leaf-servers", f"nats-leaf://{pair.hub.machine.address}:7422")
        machine.shell(f"sed -i '/^node_id = /d' {node.config}")
        node.enable()
    ids = [node.wait_status("healthy", 60)["node_id"] for node in (*nodes, pair.leaf)]
    assert len(set(ids)) == 3, ids
    machine.systemctl("restart", *(node.unit for node in nodes))
    assert [node.wait_status("healthy", 60)["node_id"] for node in nodes] == ids[:2]
    machine.systemctl("disable", "--now", *(node.unit for node in nodes))


def test_a_password_that_only_root_may_read(pair: Pair) -> None:
    """LoadCredential= hands it to the service, as the unit's comments say; an external NATS asks for it."""
    machine = pair.hub.machine
    machine.run(
        *("systemd-run", "--unit=external", "/usr/lib/harmonylite/nats-server", "--addr=127.0.0.1", "--port=4333"),
        *("--jetstream", "--store_dir=/var/lib/external", "--user=device", "--pass=open-sesame"),
    )
    node = Appliance(machine, 8, "/srv/secret/app.db", "secret")
    node.make_application()
    node.setup("--instance", "secret")
    node.set("urls", '["nats://127.0.0.1:4333"]')
    node.set("user_name", '"device"')
    node.enable()
    assert node.wait_status("degraded")["nats_error"]
    file = "/etc/harmonylite/nats-password"
    machine.write(file, "open-sesame\n", mode="0600")
    assert machine.try_run("cat", file, user="harmonylite").code != 0
    machine.write(
        f"/etc/systemd/system/{node.unit}.d/password.conf", f"[Service]\nLoadCredential=nats_user_password:{file}\n"
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", node.unit)
    node.wait_status("healthy", 60)
    node.sql("INSERT INTO orders VALUES (1, 'x', 1)")
    machine.wait(lambda: node.status()["pending_rows"] == 0, "the change is sent")
    assert "open-sesame" not in machine.journal(node.unit)
    machine.systemctl("disable", "--now", node.unit)
    machine.systemctl("stop", "external.service")
