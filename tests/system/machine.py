"""Machines that boot: Debian in systemd-nspawn, each with its own init, network namespace and cgroup.

What a machine needs of the host lives in processes: mounts in a mount namespace of its own, the network in a
namespace that a sleeping process holds, all of them killed with the test run. Nothing is left behind, however that
ends, and no setting of the host is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.system.trees import CACHE, Tree, ensure

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_REBOOT = 133  # systemd-nspawn(1): the container asked for a reboot
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_libc = ctypes.CDLL(None, use_errno=True)


class CommandFailed(AssertionError):  # noqa: N818
    """A command inside a machine ended with another exit code than 0; the text has its output."""


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A small ext4 file system of its own at `point`."""

    point: str
    size_mb: int
    options: str = "errors=remount-ro"


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(condition: Callable[[], T], what: str, timeout: float = 20.0, pause: float = 0.1) -> T:
    """The first true value of `condition`; AssertionError naming `what` and the last value after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}; last seen: {value!r}")
        time.sleep(pause)
    return value


class _Namespace:
    """A network namespace, alive as long as the process that holds it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent
        )
        own = Path("/proc/self/ns/net").readlink()
        # Until unshare(1) has done its work the process is still in the host's namespace.
        wait_until(
            lambda: self._comm() == "sleep" and Path(self.path).readlink() != own, "a network namespace", pause=0.01
        )
        self.ip("link", "set", "lo", "up")

    def _comm(self) -> str:
        return Path(f"/proc/{self.pid}/comm").read_text().strip()

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    def ip(self, *arguments: str) -> None:
        subprocess.run(["nsenter", f"--net={self.path}", "ip", *arguments], check=True, capture_output=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class Network:
    """A bridge that machines are plugged into with a cable each."""

    def __init__(self) -> None:
        self._switch = _Namespace()
        self._used = 0
        self._switch.ip("link", "add", "br0", "type", "bridge")
        self._switch.ip("link", "set", "br0", "up")

    def plug(self, machine: _Namespace) -> tuple[str, str]:
        """Connect a machine's namespace; gives the cable's name and the machine's address."""
        self._used += 1
        cable, address = f"cable{self._used}", f"10.213.0.{self._used}"
        self._switch.ip("link", "add", cable, "type", "veth", "peer", "name", "host0", "netns", str(machine.pid))
        self._switch.ip("link", "set", cable, "master", "br0", "up")
        machine.ip("address", "add", f"{address}/24", "dev", "host0")
        machine.ip("link", "set", "host0", "up")
        return cable, address

    def cut(self, cable: str) -> None:
        self._switch.ip("link", "set", cable, "down")

    def mend(self, cable: str) -> None:
        self._switch.ip("link", "set", cable, "up")

    def close(self) -> None:
        self._switch.close()


class Machine:
    """One Debian machine. Made by `Farm.machine`; its disk survives reboots and power cuts."""

    def __init__(
        self, name: str, tree: Tree, folder: Path, network: Network, binds: Sequence[str], disks: Sequence[Disk]
    ) -> None:
        self.name = name
        self.tree = tree
        self.folder = folder
        self._lower = ensure(tree)
        self._binds = tuple(binds)
        self._disks = tuple(disks)
        self._network = network
        self._namespace = _Namespace()
        self._cable, self.address = network.plug(self._namespace)
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._slow = 8.0 if tree.emulated else 1.0
        self.read_only = False  # from the next start on: everything but the disks and what is in memory
        for part in ("upper", "work", "root"):
            (folder / part).mkdir(parents=True)
        for disk in self._disks:
            self._format(disk)

    # -- power

    @property
    def log(self) -> str:
        """What the console showed, for a failed boot."""
        return (self.folder / "console.log").read_text("utf-8", "replace")

    def start(self) -> None:
        """Boot; returns when the init system has done its work."""
        groups = self._cgroups()
        for group in groups:
            group.mkdir(exist_ok=True)
        script = "\n".join(
            (
                "set -e",
                *(f"echo $$ >{shlex.quote(str(group / 'cgroup.procs'))}" for group in groups),
                *self._mounts(),
                f"exec systemd-nspawn {shlex.join(self._nspawn_arguments())}",
            )
        )
        with (self.folder / "console.log").open("ab") as console:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=_die_with_parent,
            )
        self._leader = self._wait(self._find_leader, "its init started", 10)
        state = self._wait(self._booted, "it is booted", 60)
        assert state in ("running", "degraded"), f"{self.name} is {state}: {self.log}"

    def _mounts(self) -> Iterator[str]:
        root = self.folder / "root"
        layers = f"lowerdir={self._lower},upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        yield f"mount -t overlay overlay -o {shlex.quote(layers)} {shlex.quote(str(root))}"
        for disk in self._disks:
            yield f"mount -o loop,{disk.options} {shlex.quote(str(self.image(disk)))} {shlex.quote(self._mount(disk))}"

    def _mount(self, disk: Disk) -> str:
        """Where the host mounts a disk, for the machine to have it bound to its place."""
        return str(self.image(disk).with_suffix(""))

    def _nspawn_arguments(self) -> tuple[str, ...]:
        return (
            "--quiet",
            f"--directory={self.folder / 'root'}",
            f"--machine={self.name}",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            f"--network-namespace-path={self._namespace.path}",
            *(f"--bind-ro={bind}" for bind in self._binds),
            *(f"--bind={self._mount(disk)}:{disk.point}" for disk in self._disks),
            *(("--read-only",) if self.read_only else ()),
        )

    def _cgroups(self) -> tuple[Path, ...]:
        """A cgroup of its own in each hierarchy that systemd looks at (one, or two on a hybrid host)."""
        top = Path("/sys/fs/cgroup")
        tops = (top,) if (top / "cgroup.controllers").exists() else (top / "systemd", top / "unified")
        return tuple(one / f"harmonylite-test-{os.getpid()}-{self.name}" for one in tops if one.exists())

    def _find_leader(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"{self.name} did not start (exit code {self._process.returncode}): {self.log}")
        for child in _children(self._process.pid):
            with contextlib.suppress(OSError):
                if "NSpid" in (status := Path(f"/proc/{child}/status").read_text()) and _inner_pid(status) == 1:
                    return child
        return 0

    def _booted(self) -> str:
        done = self._nsenter("systemctl", "is-system-running", "--wait", timeout=60 * self._slow)
        return done.out.strip() if done.out.strip() not in ("", "offline", "unknown") else ""

    def stop(self) -> None:
        """Shut down in an orderly way."""
        self._shut_down("poweroff", 0)

    def reboot(self) -> None:
        self._shut_down("reboot", _REBOOT)
        self.start()

    def _shut_down(self, how: str, expected: int) -> None:
        assert self._process is not None
        self._nsenter("systemctl", "--no-block", how)
        code = self._process.wait(60 * self._slow)
        self._process = None
        assert code == expected, f"{self.name} ended with {code} at {how}: {self.log}"
        self._remove_cgroups()

    def cut_power(self) -> None:
        """Everything in the machine ends at once."""
        if self._process is not None:
            leader = self._leader
            self._process.kill()
            self._process.wait()
            self._process = None
            with contextlib.suppress(ProcessLookupError):
                if leader:
                    os.kill(leader, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{leader}").exists(), "its init is gone", pause=0.01)
        self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        for top in self._cgroups():
            for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            # A killed process leaves its cgroup a moment after it is gone.
            wait_until(lambda top=top: _removed(top), f"{top} is empty", pause=0.02)

    def close(self) -> None:
        """Gone without a trace."""
        self.cut_power()
        self._namespace.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- disks and cables

    def image(self, disk: Disk) -> Path:
        return self.folder / f"{disk.point.strip('/').replace('/', '-')}.img"

    def _format(self, disk: Disk) -> None:
        Path(self._mount(disk)).mkdir()
        with self.image(disk).open("wb") as file:
            file.truncate(disk.size_mb << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(self.image(disk))], check=True, capture_output=True)

    def check_disk(self, disk: Disk) -> None:
        """What a boot does to a file system with errors; only while the machine is off."""
        done = subprocess.run(["e2fsck", "-f", "-y", str(self.image(disk))], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr  # e2fsck(8): 1 is "errors corrected"

    def break_disk(self, disk: Disk) -> None:
        """Make the kernel find an error in the file system: it turns read-only."""
        image = str(self.image(disk))
        listed = subprocess.run(["losetup", "--noheadings", "--output", "NAME", "-j", image], check=True, text=True,
                                capture_output=True)  # fmt: skip
        device = Path(listed.stdout.strip()).name
        assert device.startswith("loop"), f"{image} is not mounted"
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("broken by a test")

    def unplug(self) -> None:
        self._network.cut(self._cable)

    def plug(self) -> None:
        self._network.mend(self._cable)

    # -- commands

    def _nsenter(self, *command: str, stdin: bytes = b"", timeout: float = 60.0) -> Result:
        """Run in the machine's namespaces with the host's privileges: for systemctl and journalctl alone.

        Never for what could reach through to the host, such as the clock.
        """
        done = subprocess.run(
            ["nsenter", f"--target={self._leader}", "--all", "env", "-i", f"PATH={_PATH}", "LC_ALL=C.UTF-8", *command],
            input=stdin,
            capture_output=True,
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    def try_run(self, *command: str, stdin: str = "", user: str = "root", timeout: float = 60.0) -> Result:
        """Run a command as a service of the machine's own init, with the machine's privileges."""
        return self._nsenter(
            "systemd-run",
            "--quiet",
            "--wait",
            "--pipe",
            "--collect",
            "--service-type=exec",
            f"--uid={user}",
            "--setenv=DEBIAN_FRONTEND=noninteractive",
            "--setenv=LC_ALL=C.UTF-8",
            "--",
            # systemd-run(1) expands variables of its own in what it is given.
            *(word.replace("$", "$$") for word in command),
            stdin=stdin.encode(),
            timeout=timeout * self._slow,
        )

    def run(self, *command: str, stdin: str = "", user: str = "root", timeout: float = 60.0) -> str:
        """What the command printed; CommandFailed unless it ended with 0."""
        result = self.try_run(*command, stdin=stdin, user=user, timeout=timeout)
        if result.code != 0:
            raise CommandFailed(
                f"{self.name}: {shlex.join(command)} ended with {result.code}\n{result.out}{result.err}"
            )
        return result.out

    def shell(self, script: str, user: str = "root", timeout: float = 60.0) -> str:
        return self.run("sh", "-ec", script, user=user, timeout=timeout)

    def systemctl(self, *arguments: str) -> str:
        result = self._nsenter("systemctl", *arguments, timeout=100 * self._slow)
        if result.code != 0:
            raise CommandFailed(f"{self.name}: systemctl {shlex.join(arguments)}: {result.out}{result.err}")
        return result.out

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str, since: str = "") -> str:
        """A unit's log of this boot, without times. since: a cursor of `cursor`."""
        after = [f"--after-cursor={since}"] if since else []
        result = self._nsenter("journalctl", "-b", "-o", "cat", "--no-pager", "-u", unit, *after)
        return result.out

    def cursor(self) -> str:
        """The place in the journal where the next line will come."""
        result = self._nsenter("journalctl", "-n", "0", "--show-cursor", "--no-pager", "-q")
        return result.out.strip().removeprefix("-- cursor: ")

    def path(self, inside: str) -> Path:
        """A file of the running machine as the host sees it, for reading."""
        return Path(f"/proc/{self._leader}/root{inside}")

    def write(self, inside: str, text: str, mode: str = "0644") -> None:
        self.run("sh", "-ec", 'mkdir -p "$(dirname "$1")"; cat >"$1"; chmod "$2" "$1"', "-", inside, mode, stdin=text)

    def pids(self, name: str) -> tuple[int, ...]:
        """Processes of this name, as the machine counts them."""
        out = self.try_run("pgrep", "-x", name).out
        return tuple(int(line) for line in out.split())

    def wait(self, condition: Callable[[], T], what: str, timeout: float = 20.0) -> T:
        """As `wait_until`, with more patience where the machine is emulated."""
        return self._wait(condition, what, timeout)

    def _wait(self, condition: Callable[[], T], what: str, timeout: float) -> T:
        return wait_until(condition, f"{self.name}: {what}", timeout * self._slow, 0.05)


def _removed(folder: Path) -> bool:
    if not folder.exists():
        return True
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            below.rmdir()
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def _inner_pid(status: str) -> int:
    """The process id in the innermost namespace (proc(5), NSpid), 0 outside of any."""
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    inner = line.split()[1:]
    return int(inner[-1]) if len(inner) > 1 else 0


class Farm:
    """All machines of a test run, and their network."""

    def __init__(self, binds: Sequence[str] = ()) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        _remove_stale()
        self._folder = CACHE / "machines" / str(os.getpid())
        self._folder.mkdir(parents=True)
        self._binds = tuple(binds)
        self._machines: dict[str, Machine] = {}
        self.network = Network()

    def machine(self, name: str, tree: Tree, *, disks: Sequence[Disk] = ()) -> Machine:
        """A machine with a fresh disk, booted."""
        machine = Machine(name, tree, self._folder / name, self.network, self._binds, disks)
        self._machines[name] = machine
        machine.start()
        return machine

    def remove(self, machine: Machine) -> None:
        del self._machines[machine.name]
        machine.close()

    def close(self) -> None:
        for machine in list(self._machines.values()):
            self.remove(machine)
        self.network.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_stale() -> None:
    """What runs that were killed have left: disks, cgroups, and the init of an emulated machine, which outlives the
    process that started it; mounts and networks went with their processes."""
    for folder in CACHE.glob("machines/*"):
        if not Path(f"/proc/{folder.name}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in CACHE.glob("packages-*"):
        if not Path(f"/proc/{folder.name.split('-')[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    for group in Path("/sys/fs/cgroup").glob("**/harmonylite-test-*"):
        if not Path(f"/proc/{group.name.split('-')[2]}").exists():
            for members in group.rglob("cgroup.procs"):
                for pid in members.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(AssertionError):
                wait_until(lambda group=group: _removed(group), f"{group} is empty", 5)
