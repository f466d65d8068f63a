"""The operating system's side of the bundled nats-server: finding the program, starting it so that it dies with us,
ending what a daemon that crashed left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from harmonylite.stream.server_settings import ServerSettings

PACKAGED_BINARY = Path("/usr/lib/harmonylite/nats-server")
_ELSEWHERE = (Path("/usr/sbin/nats-server"), Path("/usr/bin/nats-server"), Path("/usr/local/bin/nats-server"))
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_VERSION_TIMEOUT_S = 30.0
_STALE_TIMEOUT_S = 5.0

# Runs between fork and exec, as a program of its own: subprocess's preexec_fn would run Python code in the forked
# copy of a process with several threads, which can deadlock. The kernel sends the signal when the *thread* that
# started the child ends, so the event loop has to live as long as the daemon; the setting survives exec (prctl(2)).
# SIGTERM lets the server close its store in order; one that hangs is ended by `end_stale_servers` at the next start.
_LAUNCHER = f"""
import os, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
try:
    import ctypes
    if ctypes.CDLL(None, use_errno=True).prctl(1, {int(signal.SIGTERM)}, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
except Exception as error:
    print("[0] [WRN] the server would survive a crash of the daemon:", error, file=sys.stderr)
if os.getppid() != parent:
    sys.exit("nats-server: the daemon ended while the server was being started")
try:
    os.execv(program[0], program)
except OSError as error:
    sys.exit(f"nats-server: {{program[0]}}: {{error.strerror}}")
"""


class StartError(Exception):
    """The server cannot be started now; the text is one line for operators."""


def find_binary(configured: str = "") -> Path:
    """The nats-server to run: `configured`, or the one installed with us (in the virtual environment, in the
    package's folder), or one on PATH. Raises StartError.
    """
    if configured:
        return Path(configured).absolute()
    candidates = [
        *([Path(sysconfig.get_path("scripts"), "nats-server")] if sys.prefix != sys.base_prefix else []),
        PACKAGED_BINARY,
        *(Path(folder, "nats-server") for folder in os.get_exec_path()),
        *_ELSEWHERE,
    ]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.absolute()
    raise StartError(
        "no nats-server found: install the package harmonylite-nats-server or nats-server, "
        "or name one in [nats] server_binary"
    )


def binary_version(binary: Path) -> tuple[int, int, int]:
    """Run `binary --version`. Blocks for a moment. Raises StartError that says why it cannot run."""
    try:
        done = subprocess.run(
            [str(binary), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_TIMEOUT_S,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StartError(f"{binary} --version does not answer: is it a nats-server?") from None
    except OSError as error:
        raise StartError(_explain_exec(binary, error)) from None
    match = _VERSION.search(done.stdout)
    if done.returncode != 0 or match is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        detail = said[0] if said else f"code {done.returncode}"
        raise StartError(f"{binary} does not work as a nats-server: {detail}")
    return int(match[1]), int(match[2]), int(match[3])


def _explain_exec(binary: Path, error: OSError) -> str:
    if error.errno == errno.ENOEXEC:
        return f"{binary} is not a program for this machine ({os.uname().machine}): install the one for it"
    if isinstance(error, PermissionError):
        return f"{binary} is not executable for this user: chmod a+rx, or mount its file system without noexec"
    if isinstance(error, FileNotFoundError):
        if binary.exists():
            return f"{binary} needs a loader or library that is missing here: install the one for this machine"
        return f"there is no {binary} ([nats] server_binary)"
    return f"{binary} cannot be run: {error.strerror}"


async def spawn(command: list[str], environment: dict[str, str]) -> asyncio.subprocess.Process:
    """Start `command` (an absolute path and arguments) so that it ends when this process does.

    Its output comes through `stderr`. It gets a session of its own: Ctrl-C reaches the daemon alone, which may
    still have to publish. Raises OSError.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())] if sys.executable else []
    return await asyncio.create_subprocess_exec(
        *launcher,
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def server_environment(memory_limit: str) -> dict[str, str]:
    """Our environment (an operator's file may refer to it) with Go's soft memory limit, unless one is set."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_PID")}
    environment.setdefault("GOMEMLIMIT", memory_limit)
    return environment


class NodeLock:
    """Held while this process runs a node's server: then any other server with its configuration is a leftover."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Raises StartError if another process holds it, OSError if the file cannot be made."""
        if self._handle is not None:
            return
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise StartError(
                f"another harmonylite daemon (process {owner or 'unknown'}) runs this node's nats-server: stop it first"
            ) from None
        with contextlib.suppress(OSError):  # for people only, and the disk may be full
            os.truncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        self._handle = handle

    def release(self) -> None:
        """The file stays: removing it would let two processes lock two files of one name."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def end_stale_servers(config_file: Path) -> list[int]:
    """End servers that run with `config_file`; the caller holds the node's lock. Blocks up to some seconds.

    Returns the ids of the processes that were there.
    """
    found = list(_processes_with(config_file))
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in _processes_with(config_file):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, sign)
                os.kill(process, signal.SIGCONT)  # one that was stopped would not notice
        deadline = time.monotonic() + _STALE_TIMEOUT_S
        while any(_processes_with(config_file)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    return found


def _processes_with(config_file: Path) -> Iterator[int]:
    """Processes whose command line is a server's with that configuration: an absolute path of ours, so no other's."""
    argument = os.fsencode(config_file)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(process.name) != os.getpid() and b"--config" in arguments and argument in arguments:
            yield int(process.name)


def server_command(binary: Path, settings: ServerSettings) -> list[str]:
    """The server with our configuration; its ports file shows that it listens, and where."""
    return [
        str(binary),
        "--config",
        str(settings.own_file(".conf")),
        "--ports_file_dir",
        str(settings.data_dir.absolute()),
    ]


def read_ports(directory: Path, pid: int) -> str | None:
    """The client URL that the server with that process id wrote when it began to listen, None before that.

    A server that listens on all interfaces is reached through loopback.
    """
    for path in directory.glob(f"*_{pid}.ports"):
        try:
            urls: list[str] = json.loads(path.read_text())["nats"]
        except (OSError, ValueError, KeyError):  # being written
            continue
        # Listening everywhere, it names an address of each interface; loopback is the one that never goes away.
        return next((url for url in urls if "//127." in url or "//[::1]" in url or "//localhost" in url), urls[0])
    return None


def remove_ports_files(directory: Path, pid: int | None = None) -> None:
    """Remove the ports file of `pid`; without one, those of processes that are gone."""
    for path in directory.glob(f"*_{'*' if pid is None else pid}.ports"):
        if pid is not None or not Path("/proc", path.stem.rpartition("_")[2]).exists():
            path.unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Replace `path` with `text`, readable for its owner alone, whole or not at all. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
