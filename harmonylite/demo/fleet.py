"""The demo's nodes: real daemons with their real nats-servers, in one folder, on free ports of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harmonylite.demo.link import Link
from harmonylite.observe import control
from harmonylite.observe.status import NodeStatus

# Longer than any wait of a machine that works, even a loaded one; an endless demo would be worse than a failed one.
PATIENCE_S = 30.0
# What a daemon may take to publish, end its nats-server and leave.
_STOP_S = 10.0
_POLL_S = 0.002

# The daemon ends even if the demo is killed with -9. prctl(2): PR_SET_PDEATHSIG survives exec.
_LAUNCHER = f"""
import os, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})
except Exception:
    pass  # then only an orderly end ends it
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, "-m", "harmonylite", *sys.argv[2:]])
"""


class DemoFailed(Exception):  # noqa: N818
    """The demo cannot go on. The text is one line: what, where, what to do."""


class Node:
    """One node: a folder with a database, a configuration and a log, and the daemon that runs on them.

    nats: the lines of its [nats] section, as TOML.
    """

    def __init__(self, folder: Path, name: str, node_id: int, nats: str) -> None:
        self.name = name
        self.node_id = node_id
        self.folder = folder / name
        self.db_path = self.folder / "shop.db"
        self.config_path = self.folder / "config.toml"
        self.log_path = self.folder / "harmonylite.log"
        self._daemon: subprocess.Popen[bytes] | None = None
        self.folder.mkdir()
        self.configure(nats)

    def configure(self, nats: str) -> None:
        """Write the configuration file."""
        text = f"db_path = {toml(self.db_path)}\nnode_id = {self.node_id}\n[nats]\n{nats}\n"
        self.config_path.write_text(text, encoding="utf-8")

    def start(self) -> None:
        """Start the daemon; returns at once. From the main thread: the daemon ends with the thread that starts it."""
        command = [sys.executable, "-c", _LAUNCHER, str(os.getpid()), "run", "--config", str(self.config_path)]
        with self.log_path.open("ab") as log:
            # A session of its own: Ctrl-C is for the demo, which then ends the daemons.
            self._daemon = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def check(self) -> None:
        """Raises DemoFailed if the daemon has ended by itself."""
        if self._daemon is not None and (code := self._daemon.poll()) is not None:
            raise DemoFailed(f"the daemon of {self.name} ended with code {code}: {self._last_words()}")

    def status(self) -> NodeStatus | None:
        """What the daemon says of itself; None while it does not answer."""
        try:
            return NodeStatus.from_json(control.query(self.db_path, {"command": "status"}))
        except control.ControlError:
            return None

    def run(self, *arguments: str) -> str:
        """The output of a `harmonylite` command on this node. Raises DemoFailed if it fails."""
        command = [sys.executable, "-m", "harmonylite", *arguments, "--config", str(self.config_path)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"harmonylite {arguments[0]} on {self.name} did not end in {PATIENCE_S:g} s") from None
        if done.returncode:
            raise DemoFailed(f"harmonylite {arguments[0]} on {self.name} failed: {done.stderr.strip()}")
        return done.stdout

    def ask_to_stop(self) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            self._daemon.terminate()

    def wait_stopped(self, deadline: float) -> None:
        """Wait until the daemon is gone, by force after `deadline` (monotonic seconds). It ends its nats-server."""
        if self._daemon is None:
            return
        try:
            self._daemon.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            if lines := self.log_path.read_text("utf-8", "replace").split("\n")[-2:-1]:
                return lines[0]
        return "it said nothing"


class Fleet:
    """An office, the hub, and two shops, its leaves; the network of the first shop can be cut."""

    def __init__(self) -> None:
        port = _free_port()
        self._link = Link(port)
        self._direct = f'leaf_servers = ["nats-leaf://127.0.0.1:{port}"]'
        self.folder = Path(tempfile.mkdtemp(prefix="harmonylite-demo-"))
        try:
            # The hub's server would tell its leaves all its addresses, and they would go round a link that is cut.
            hub_file = self.folder / "hub.conf"
            hub_file.write_text(f'leafnodes {{\n  listen: "127.0.0.1:{port}"\n  no_advertise: true\n}}\n')
            hub = f'leaf_listen = "127.0.0.1:{port}"\nserver_config = {toml(hub_file)}'
            through_link = f'leaf_servers = ["nats-leaf://127.0.0.1:{self._link.port}"]'
            self.office = Node(self.folder, "office", 1, hub)
            self.north = Node(self.folder, "north", 2, through_link)
            self.south = Node(self.folder, "south", 3, self._direct)
        except BaseException:
            self.remove()
            raise
        self.nodes = (self.office, self.north, self.south)

    def cut(self) -> None:
        """Cut the first shop's network."""
        self._link.cut()

    def mend(self) -> None:
        self._link.mend()

    def start(self) -> None:
        """Start all daemons; returns at once."""
        for node in self.nodes:
            node.start()

    def check(self) -> None:
        """Raises DemoFailed if a daemon has ended by itself."""
        for node in self.nodes:
            node.check()

    def reached(self, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> float | None:
        """Wait for `condition`: the seconds it took, None if it is not met in time. Raises DemoFailed for a daemon
        that ended.
        """
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > patience_s:
                return None
            self.check()
            time.sleep(_POLL_S)
        return time.monotonic() - begun

    def wait(self, condition: Callable[[], bool], what: str) -> float:
        """The same; raises DemoFailed that says `what` did not come."""
        took = self.reached(condition)
        if took is None:
            raise DemoFailed(
                f"{what}: not within {PATIENCE_S:g} s; harmonylite.log in each node's folder says more"
                " (harmonylite demo --keep leaves them)"
            )
        return took

    def stop(self) -> None:
        """End every process."""
        for node in self.nodes:
            node.ask_to_stop()
        deadline = time.monotonic() + _STOP_S
        for node in self.nodes:
            node.wait_stopped(deadline)
        self._link.close()

    def remove(self) -> None:
        """Remove the folder, after `stop`. A nats-server whose daemon had to be killed may need a moment to end."""
        deadline = time.monotonic() + _STOP_S
        while self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=time.monotonic() < deadline)
            time.sleep(_POLL_S)

    def hand_over(self) -> Iterator[str]:
        """Make the folder one that works without the demo, and say what can be done with it: command lines."""
        self.north.configure(self._direct)  # the link is gone
        harmonylite = _command()
        yield f"sqlite3 {shlex.quote(str(self.north.db_path))} 'SELECT * FROM products'"
        yield f"{harmonylite} conflicts --config {shlex.quote(str(self.office.config_path))}"
        for node in self.nodes:
            yield f"{harmonylite} run --config {shlex.quote(str(node.config_path))}"
        yield f"rm -r {shlex.quote(str(self.folder))}"


def toml(value: object) -> str:
    """A TOML basic string. JSON's escapes are TOML's too (https://toml.io/en/v1.0.0#string)."""
    return json.dumps(str(value), ensure_ascii=False)


def _command() -> str:
    """How this person calls us."""
    program = sys.argv[0]
    if Path(program).name == "harmonylite":
        return shlex.quote(program)
    return f"{shlex.quote(sys.executable)} -m harmonylite"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
