"""The bundled nats-server as our child: started, watched, started again, stopped, never left behind.

State: `BundledServer.state`. Life cycle of one child: prepare (lock, leftovers, program, configuration) -> starting
-> listening (its ports file is there) -> ended. Whatever ends it, the next one starts after a pause that doubles
from 1 s to 60 s and starts over after a minute of health; it never gives up. Restarts without a pause: `restart`,
and a disk that was full and has room again (a stream that met a full disk stays dead until then).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from harmonylite.stream.credentials import SettingsError
from harmonylite.stream.server_config import (
    ASSUMED_VERSION,
    USABLE_SHARE,
    ServerPlan,
    free_bytes,
    plan_server,
    store_limit,
)
from harmonylite.stream.server_log import HubLink, ServerLog, explain_end
from harmonylite.stream.server_process import (
    NodeLock,
    StartError,
    binary_version,
    end_stale_servers,
    find_binary,
    read_ports,
    remove_ports_files,
    server_command,
    server_environment,
    spawn,
    write_private,
)
from harmonylite.stream.server_settings import ServerSettings

__all__ = ["BundledServer", "Pauses", "ServerState"]

log = logging.getLogger(__name__)

_PORTS_POLL_S = 0.05
_SLOW_START_S = 30.0
# Restart for a larger store only when it is worth it: twice the limit in force.
_WORTHWHILE_GROWTH = 2


@dataclass(frozen=True, slots=True)
class ServerState:
    """running: it listens; pid: the child's process id; restarts: children that ended since `start`;
    failures: of those, how many in a row without a minute of health; last_error: why the last one ended or could
    not start (None while all is well); storage_error, link_error: see `ServerLog`.
    """

    running: bool = False
    pid: int | None = None
    restarts: int = 0
    failures: int = 0
    last_error: str | None = None
    storage_error: str | None = None
    link_error: str | None = None


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds. first, longest: between two starts; healthy: running so long makes the next pause the first again;
    stop: from SIGTERM to SIGKILL; disk_check: between two looks at a disk that was full or nearly.
    """

    first: float = 1.0
    longest: float = 60.0
    healthy: float = 60.0
    stop: float = 5.0
    disk_check: float = 30.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    binary: Path
    version: tuple[int, int, int]
    plan: ServerPlan
    max_store: int


class BundledServer:
    """Supervises one node's nats-server. Use it from one event loop, in a thread that lives as long as the daemon."""

    def __init__(
        self,
        settings: ServerSettings,
        on_change: Callable[[ServerState], None] | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        """on_change: called in the event loop with each new state."""
        self._settings = settings
        self._on_change = on_change
        self._pauses = pauses or Pauses()
        self._lock = NodeLock(settings.own_file(".lock"))
        self._state = ServerState()
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._restarting = asyncio.Event()
        self._listening = asyncio.Event()
        # Known before any program was found; the supervisor makes the real one for the version it finds.
        self._plan = plan_server(settings, ASSUMED_VERSION, max_store=settings.max_store)
        self._link = HubLink(settings.leaf_servers)
        self._url: str | None = None

    @property
    def state(self) -> ServerState:
        """What is the case now."""
        return self._state

    @property
    def plan(self) -> ServerPlan:
        """Shape, JetStream domain and number of replicas; see ServerPlan."""
        return self._plan

    @property
    def url(self) -> str | None:
        """Where a client on this machine connects, without credentials; None while nothing listens there.

        It may differ after a restart.
        """
        return self._url

    async def start(self) -> None:
        """Begin to supervise; returns at once. What goes wrong from here on is in `state`."""
        if self._task is None:
            self._stopping.clear()
            self._task = asyncio.create_task(self._supervise(), name="nats-server supervisor")

    async def stop(self) -> None:
        """End the server and wait until it is gone."""
        if self._task is None:
            return
        self._stopping.set()
        await self._task
        self._task = None

    async def restart(self, reason: str) -> None:
        """End the running server, if any, and start it again at once; returns when that is under way."""
        log.warning("nats-server is restarted", extra={"fields": {"reason": reason}})
        self._url = None
        self._listening.clear()
        self._restarting.set()
        await asyncio.sleep(0)

    async def wait_listening(self) -> str:
        """Wait until clients can connect; returns `url`."""
        while self._url is None:
            await self._listening.wait()
        return self._url

    # The supervisor

    async def _supervise(self) -> None:
        pause = self._pauses.first
        try:
            while not self._stopping.is_set():
                begun = time.monotonic()
                error = await self._one_life()
                if self._stopping.is_set():
                    break
                if time.monotonic() - begun >= self._pauses.healthy:
                    pause = self._pauses.first
                    self._change(failures=0)
                if error is None:
                    self._change(restarts=self._state.restarts + 1)
                    continue
                self._change(last_error=error, restarts=self._state.restarts + 1, failures=self._state.failures + 1)
                log.error("nats-server is down, trying again", extra={"fields": {"error": error, "in_s": pause}})
                await self._pause(pause)
                pause = min(pause * 2, self._pauses.longest)
        finally:
            self._lock.release()

    async def _pause(self, seconds: float) -> None:
        await _first(seconds, self._stopping.wait(), self._restarting.wait())

    async def _one_life(self) -> str | None:
        """From preparing to the child's end; returns why it ended, None if that was wanted."""
        self._restarting.clear()
        try:
            prepared = await asyncio.to_thread(self._prepare)
            return await self._run_child(prepared)
        except (StartError, SettingsError) as error:
            return str(error)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return f"nats-server cannot be started: {where}{error.strerror or error}"
        except Exception as error:  # whatever it was, the supervisor goes on
            return f"nats-server cannot be started, a mistake in harmonylite: {error!r}"

    def _prepare(self) -> _Prepared:
        """Everything that may block; runs in a thread of its own. Raises StartError, SettingsError, OSError."""
        settings = self._settings
        folder = settings.data_dir
        try:
            folder.mkdir(exist_ok=True)  # not what it is in: that is the database's folder, or a disk to be mounted
            if self._plan.jetstream:
                folder = settings.store_dir
                folder.mkdir(mode=0o750, exist_ok=True)
                self._probe_store(1)
        except OSError as error:
            raise StartError(f"{folder} ([nats] store_dir) cannot be written: {error.strerror}") from None
        self._lock.acquire()
        config_file = settings.own_file(".conf")
        if stale := end_stale_servers(config_file):
            log.warning("ended a nats-server that a crashed daemon left behind", extra={"fields": {"pids": stale}})
        remove_ports_files(settings.data_dir)
        binary = find_binary(settings.server_binary)
        version = binary_version(binary)
        max_store = store_limit(settings.store_dir, settings.max_store)
        plan = plan_server(settings, version, max_store=max_store)
        write_private(config_file, plan.text)
        return _Prepared(binary, version, plan, max_store)

    async def _run_child(self, prepared: _Prepared) -> str | None:
        settings, plan = self._settings, prepared.plan
        if plan.warnings != self._plan.warnings or self._state.restarts == 0:
            for warning in plan.warnings:
                log.warning("nats-server configuration", extra={"fields": {"warning": warning}})
        self._plan = plan
        said = ServerLog(dials=plan.shape in ("leaf", "cluster"))
        child = await spawn(server_command(prepared.binary, settings), server_environment(plan.memory_limit))
        self._change(pid=child.pid, storage_error=None, link_error=None)
        reading = asyncio.create_task(self._read_output(child, said))
        ended = asyncio.create_task(child.wait())
        try:
            await self._until_listening(child, ended, prepared)
            if self._url is not None:
                await self._until_restart_or_end(ended, said, prepared)
        finally:
            wanted = not ended.done()
            await self._end(child, ended)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reading, self._pauses.stop)
            self._url = None
            self._listening.clear()
            remove_ports_files(settings.data_dir, child.pid)
            self._change(running=False, pid=None)
        if wanted:
            return None
        return await asyncio.to_thread(explain_end, ended.result(), said, settings)

    async def _until_listening(
        self, child: asyncio.subprocess.Process, ended: asyncio.Task[int], prepared: _Prepared
    ) -> None:
        """Returns when the server listens (then `url` is set), or has ended, or is to end."""
        begun = reported = time.monotonic()
        while not (ended.done() or self._stopping.is_set() or self._restarting.is_set()):
            # Named by process id: whoever else may hold the port, this is our child.
            if url := read_ports(self._settings.data_dir, child.pid):
                self._url = url
                self._change(running=True, last_error=None)
                self._listening.set()
                fields = {
                    "url": url,
                    "shape": prepared.plan.shape,
                    "version": ".".join(map(str, prepared.version)),
                    "pid": child.pid,
                    "max_store": prepared.max_store,
                }
                log.info("nats-server listens", extra={"fields": fields})
                return
            if time.monotonic() - reported > _SLOW_START_S:
                reported = time.monotonic()
                fields = {"pid": child.pid, "since_s": round(reported - begun)}
                log.warning("nats-server does not listen yet, perhaps it reads a large store", extra={"fields": fields})
            await _first(_PORTS_POLL_S, self._stopping.wait(), self._restarting.wait(), _done(ended))

    async def _until_restart_or_end(self, ended: asyncio.Task[int], said: ServerLog, prepared: _Prepared) -> None:
        begun = time.monotonic()
        while True:
            await _first(self._pauses.disk_check, self._stopping.wait(), self._restarting.wait(), _done(ended))
            if ended.done() or self._stopping.is_set() or self._restarting.is_set():
                return
            self._follow_link(said)
            if self._state.failures and time.monotonic() - begun >= self._pauses.healthy:
                self._change(failures=0)
            if reason := await asyncio.to_thread(self._why_restart, said, prepared):
                await self.restart(reason)

    def _why_restart(self, said: ServerLog, prepared: _Prepared) -> str | None:
        """Is there now room that the running server cannot use?"""
        settings = self._settings
        if not prepared.plan.jetstream:
            return None
        if said.disk_full:
            try:
                self._probe_store(1 << 20)
            except OSError:
                return None
            return "the disk was full and has room again"
        possible = int(free_bytes(settings.store_dir) * USABLE_SHARE)
        if min(possible, settings.max_store or possible) >= prepared.max_store * _WORTHWHILE_GROWTH:
            return "the disk has room for a larger store"
        return None

    def _probe_store(self, size: int) -> None:
        """Raises OSError if `size` bytes cannot be written."""
        probe = self._settings.store_dir / ".harmonylite-probe"
        try:
            probe.write_bytes(bytes(size))
        finally:
            probe.unlink(missing_ok=True)

    async def _read_output(self, child: asyncio.subprocess.Process, said: ServerLog) -> None:
        assert child.stderr is not None
        while data := await child.stderr.read(1 << 16):
            if said.feed(data):
                self._change(storage_error=said.storage_error, link_error=said.link_error)
                self._follow_link(said)
        said.end()

    def _follow_link(self, said: ServerLog) -> None:
        if self._plan.shape == "leaf":
            self._link.follow(said)

    async def _end(self, child: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
        for sign, patience in ((signal.SIGTERM, self._pauses.stop), (signal.SIGKILL, None)):
            if ended.done():
                return
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(sign)
            await asyncio.wait({ended}, timeout=patience)
        log.warning("nats-server had to be killed", extra={"fields": {"pid": child.pid}})

    def _change(self, **fields: object) -> None:
        state = replace(self._state, **fields)  # type: ignore[arg-type]
        if state == self._state:
            return
        self._state = state
        if self._on_change is not None:
            try:
                self._on_change(state)
            except Exception as error:
                log.error("nats-server state listener failed", extra={"fields": {"error": repr(error)}})


async def _done(task: asyncio.Task[int]) -> None:
    """Wait for `task` without cancelling it when the wait is."""
    await asyncio.wait({task})


async def _first(timeout: float, *waits: Awaitable[object]) -> None:
    """Wait until one of `waits` is done, at most `timeout` seconds."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
