"""A machine as a user sets it up: an application that writes, and HarmonyLite from the repository beside it."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.system.machine import CommandFailed, Machine, Result

UNIT = "harmonylite.service"
FOLDER = "/var/lib/app"
DATABASE = f"{FOLDER}/app.db"
CONFIG = "/etc/harmonylite/config.toml"
SCHEMA = "CREATE TABLE orders (id INTEGER PRIMARY KEY, node TEXT NOT NULL, n INTEGER NOT NULL)"

# The application: a row every 50 ms with keys of its own, as a service that ends with the first statement that fails.
_WRITER = """
import socket, sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
name, first = socket.gethostname(), int(sys.argv[2])
[(last,)] = db.execute("SELECT coalesce(max(id), ?) FROM orders WHERE node = ?", (first, name))
while True:
    last += 1
    db.execute("INSERT INTO orders VALUES (?, ?, ?)", (last, name, last))
    time.sleep(0.05)
"""
_APP_UNIT = """\
[Unit]
Description=An application that keeps its data in SQLite
[Service]
User=app
UMask=0007
ExecStart=/usr/bin/python3 /opt/app.py {database} {first}
"""


class Appliance:
    """One device. number: from 1, gives its rows keys of their own; instance: of harmonylite@.service; user: the
    application's."""

    def __init__(
        self, machine: Machine, number: int, database: str = DATABASE, instance: str = "", user: str = "app"
    ) -> None:
        self.machine = machine
        self.number = number
        self.database = database
        self.folder = database.rpartition("/")[0]
        self.user = user
        self.unit = f"harmonylite@{instance}.service" if instance else UNIT
        self.config = f"/etc/harmonylite/{instance}.toml" if instance else CONFIG

    # -- installing

    def use_repository(self, folder: str = "/srv/apt", options: str = "") -> None:
        key = f"{folder}/harmonylite-archive-keyring.pgp"
        line = f"deb [{options} signed-by={key}] file:{folder} {self.machine.tree.suite} main\n"
        self.machine.write("/etc/apt/sources.list.d/harmonylite.list", line)
        self.machine.run("apt-get", "update", "-qq")

    def apt(self, *arguments: str) -> str:
        return self.machine.run("apt-get", "-y", "-q", "--no-install-recommends", *arguments, timeout=120)

    def make_application(self, mode: str = "0755") -> None:
        """What is there before us: a user, its folder and its database, as an ordinary installation makes them."""
        self.machine.shell(
            f"id {self.user} >/dev/null 2>&1 || useradd --system --home-dir /nonexistent {self.user}\n"
            f"install -d -o {self.user} -g {self.user} -m {mode} '{self.folder}'\n"
            "install -d /opt\n"
        )
        self.sql(SCHEMA)
        if self.unit != UNIT:
            return
        self.machine.write("/opt/app.py", _WRITER)
        first = self.number * 1_000_000_000
        self.machine.write("/etc/systemd/system/app.service", _APP_UNIT.format(database=self.database, first=first))
        self.machine.systemctl("daemon-reload")

    def setup(self, *arguments: str) -> list[str]:
        """`harmonylite setup`, the commands that it prints, and `setup` again, which must have nothing left to say.

        Gives the commands.
        """
        words = ("harmonylite", "setup", "--db", self.database, *arguments)
        first = self.machine.try_run(*words)
        commands = commands_of(first)
        for command in commands:
            self.machine.shell(command)
        again = self.machine.try_run(*words)
        assert again.code == 0, again.out + again.err
        assert (first.code == 0) == (not commands), first.out + first.err
        self.machine.systemctl("daemon-reload")
        return commands

    def set(self, key: str, value: str) -> None:
        """Uncomment a key of the packaged configuration."""
        file = self.config
        self.machine.shell(f"sed -i 's|^# {key} = .*|{key} = {value}|' {file} && grep -q '^{key} = ' {file}")

    # -- the application

    def start_writing(self) -> None:
        self.machine.systemctl("start", "app.service")

    def stop_writing(self) -> int:
        """Stop the application, which must never have failed; gives how many rows of its own the database holds."""
        assert self.machine.show("app.service", "ActiveState") == "active", self.machine.journal("app.service")
        self.machine.systemctl("stop", "app.service")
        assert self.machine.show("app.service", "Result") == "success"
        return int(self.sql(f"SELECT count(*) FROM orders WHERE node = '{self.machine.name}'"))

    def sql(self, statement: str) -> str:
        """As the application's user."""
        out = self.machine.run("sqlite3", "-cmd", ".timeout 10000", self.database, statement, user=self.user)
        return out.strip()

    def rows(self) -> int:
        return int(self.sql("SELECT count(*) FROM orders"))

    def content(self) -> str:
        """All rows in one text, to compare."""
        return self.sql("SELECT id, node, n FROM orders ORDER BY id")

    # -- the daemon

    def enable(self) -> None:
        try:
            self.machine.systemctl("enable", "--now", self.unit)
        except CommandFailed as error:
            raise AssertionError(f"{error}\n{self.machine.journal(self.unit)[-3000:]}") from None

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(
            self.machine.run("harmonylite", "status", "--json", "--config", self.config)
        )
        return document

    def wait_status(self, wanted: str = "healthy", timeout: float = 30.0) -> dict[str, Any]:
        """The status once it is as wanted."""
        last: dict[str, Any] = {}

        def look() -> bool:
            last.update(self.status())
            return bool(last["status"] == wanted)

        try:
            self.machine.wait(look, f"status is {wanted}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; {last}\n{self.machine.journal(self.unit)[-3000:]}") from None
        return last

    @property
    def main_pid(self) -> int:
        return int(self.machine.show(self.unit, "MainPID"))


def commands_of(result: Result) -> list[str]:
    """The commands that `setup` printed to mend what is missing."""
    lines = result.out.splitlines()
    found: list[str] = []
    missing = False
    for line in lines:
        if re.match(r"\S", line):
            missing = line.startswith("missing ")
        elif missing:
            found.append(line.strip())
    return found


def wait_equal(*nodes: Appliance, timeout: float = 30.0) -> str:
    """The content that all nodes have, once they do."""
    seen: list[str] = []

    def equal() -> bool:
        seen[:] = [node.content() for node in nodes]
        return len(set(seen)) == 1

    try:
        nodes[0].machine.wait(equal, "all nodes hold the same rows", timeout)
    except AssertionError as error:
        sizes = {node.machine.name: text.count("\n") + 1 for node, text in zip(nodes, seen, strict=True)}
        logs = "\n".join(f"{node.machine.name}: {node.machine.journal(node.unit)[-2000:]}" for node in nodes)
        raise AssertionError(f"{str(error)[:200]}; rows: {sizes}\n{logs}") from None
    return seen[0]
