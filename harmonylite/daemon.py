"""The daemon: puts the parts together, starts and stops them, and answers the operator.

Nothing here waits for the network: the node is ready as soon as it watches its database (I1).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import apsw

from harmonylite import __version__, reload
from harmonylite.config import Config, ConfigError, load
from harmonylite.db.replica import Replica
from harmonylite.db.watch import Watch
from harmonylite.endings import Endings
from harmonylite.engine import Engine
from harmonylite.housekeeping import Housekeeper
from harmonylite.membership import Membership
from harmonylite.observe import log as logs
from harmonylite.observe.control import AlreadyRunning, ControlServer
from harmonylite.observe.health import health_handler
from harmonylite.observe.http import HttpServer, Response
from harmonylite.observe.log import Repeated
from harmonylite.observe.metrics import CONTENT_TYPE, Metrics
from harmonylite.observe.notify import Notifier
from harmonylite.opening import Opening
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.replication import Session
from harmonylite.report import Reporter
from harmonylite.snapshot.service import SnapshotService
from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.stream.credentials import SettingsError
from harmonylite.stream.log import LogError
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.server import BundledServer
from harmonylite.stream.server_settings import ServerSettings
from harmonylite.tasks import cancelled, run_together, wait_first, wait_for
from harmonylite.timekeeping import Timekeeper
from harmonylite.uplink import Uplink
from harmonylite.wiring import TOLERANCE_MS, log_settings, replica_settings

log = logging.getLogger(__name__)

# What SIGTERM leaves for publishing what is pending.
LAST_CALL_S = 5.0
# Between two tries to use streams, or to fetch a database, that are not there.
RETRY_S = 1.0


def run(config: Config, reload: Callable[[], Config] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code. reload: reads the configuration anew, for SIGHUP; raises
    ConfigError."""
    logs.setup(verbose=config.logging.verbose, format=config.logging.format)  # type: ignore[arg-type]
    try:
        daemon = Daemon(config, reload or (lambda: load(config.file)))
        code = asyncio.run(daemon.main())
        if daemon.start_again:
            # The same process begins anew, as a supervisor sees it: nothing of the old file is left in it.
            os.execv(sys.executable, sys.orig_argv)
        return code
    except AlreadyRunning as error:
        log.error("not started", extra={"fields": {"reason": str(error)}})
        return 1
    except SettingsError as error:
        # Not for other errors: a service manager does not start it again after 2.
        log.error("wrong configuration", extra={"fields": {"error": str(error)}})
        return 2


class Daemon:
    """One node, from start to stop."""

    def __init__(self, config: Config, load_again: Callable[[], Config]) -> None:
        self._config = config
        self._load_again = load_again
        self._metrics = Metrics(config.prometheus.namespace, config.prometheus.subsystem)
        self._time = Timekeeper(TOLERANCE_MS)
        self._replica = Replica(config.db_path, replica_settings(config))
        self._engine = Engine(self._replica, self._time, self._metrics, compress=config.replication_log.compress)
        self._progress = Progress()
        self._wakeup = Wakeup()
        self._reloaded = asyncio.Event()
        self._out_of_time = False
        self._stop = asyncio.Event()
        self.start_again = False
        leaf = not config.external and bool(config.nats.leaf_servers)
        self._uplink = Uplink(leaf=leaf)
        self._server = None
        if not config.external:
            self._server = BundledServer(ServerSettings.from_config(config), self._uplink.server_changed)
        self._connection = self._uplink.connection = Connection(ClientSettings.from_config(config), self._urls)
        self._session: Session | None = None
        self._notifier = Notifier()
        self._trouble = Repeated(log, 600.0)
        self._endings = Endings(config.db_path, self._progress)
        self._snapshots = SnapshotService(config, self._engine, self._progress, wake=self._wakeup.set)
        self._reporter = Reporter(config, self._engine, self._progress, self._uplink, self._server, self._snapshots)
        self._opening = Opening(config.db_path, self._engine, self._reporter, self._notifier)
        self._membership = Membership(config, self._replica, self._reporter, self._progress, self._uplink)
        self._housekeeper = Housekeeper(
            config, self._engine, self._progress, self._uplink, self._reporter, self._notifier
        )

    def _urls(self) -> tuple[str, ...]:
        if self._server is None:
            return self._config.nats.urls
        return (self._server.url,) if self._server.url else ()

    # -- life cycle

    async def main(self) -> int:
        """Everything, until somebody asks to stop."""
        handlers = {"status": self._on_status, "cluster": self._on_cluster, **self._snapshots.handlers()}
        control = ControlServer(self._config.db_path, handlers)
        await control.start()  # first: it is also the guard against a second daemon on this database
        self._snapshots.start()
        servers = self._http_servers()
        watch = Watch(self._config.db_path, self._on_commit)
        self._catch_signals()
        log.info(
            "starting",
            extra={"fields": {"version": __version__, "node_id": self._config.node_id, "db": self._config.db_path}},
        )
        for note in self._config.notes:
            log.info("the configuration was read with a note", extra={"fields": {"note": str(note)}})
        try:
            for server in servers:
                await server.start()
            watch.start()
            if self._server is not None:
                await self._server.start()
            await self._connection.start()
            code = await self._work()
        finally:
            self._notifier.stopping("stopping")
            await self._snapshots.close()
            if not self._out_of_time:
                await self._membership.sign_off()
            await self._connection.close()
            if self._server is not None:
                await self._server.stop()
            await watch.close()
            for server in servers:
                await server.close()
            await self._engine.close()
            await control.close()
            self._notifier.close()
        log.info("stopped")
        return code

    async def _work(self) -> int:
        opening = asyncio.create_task(self._opening.run())
        replicating = asyncio.create_task(self._replicate())
        keeping = asyncio.create_task(self._housekeeper.run(self._opening.opened, self._on_replaced))
        sleeping = asyncio.create_task(self._fall_asleep())
        telling = asyncio.create_task(self._tell_connection())
        stopping = asyncio.create_task(self._stop.wait())
        tasks = {opening, replicating, keeping, sleeping, telling}
        running = {stopping, *tasks}
        try:
            while not stopping.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (error := task.exception()) is not None:
                        event = "not started" if task is opening else "a part of the daemon failed; it stops"
                        log.error(event, extra={"fields": {"reason": str(error) or type(error).__name__}})
                        return 1
            await self._last_call()
            return 0
        finally:
            for task in (stopping, *tasks):
                await cancelled(task)

    async def _last_call(self) -> None:
        """Publish what can be published in a few seconds."""
        deadline = time.monotonic() + LAST_CALL_S
        while (
            self._config.publish
            and not self.start_again
            and self._opening.opened.is_set()
            and self._uplink.connected
            and time.monotonic() < deadline
            and self._progress.publishing
        ):
            self._wakeup.set()
            if await self._pending() == 0:
                return
            await asyncio.sleep(0.05)
        self._out_of_time = time.monotonic() >= deadline

    async def _pending(self) -> int | None:
        """Rows that wait for nothing but time; None if the database does not tell."""
        try:
            return await self._engine.pending(held=False)
        except apsw.Error as error:
            self._trouble.warning("pending rows cannot be counted", {"error": str(error)})
            return None

    async def _tell_connection(self) -> None:
        """The unit's status line is right as soon as the connection has come or gone."""
        while True:
            await self._uplink.wait_changed()
            self._notifier.status(self._reporter.line())

    async def _fall_asleep(self) -> None:
        """`sleep_timeout`: exit after a while without any change, for hosts that scale to zero."""
        seen = (-1, -1)
        while True:
            timeout_s = self._config.sleep_timeout / 1000
            if await wait_first(self._reloaded, timeout_s=timeout_s or None):
                self._reloaded.clear()
                continue
            now = (self._metrics.published.value, self._metrics.applied.value)
            if now == seen and self._opening.opened.is_set() and await self._pending() == 0:
                log.info("no change for a while, stopping", extra={"fields": {"sleep_timeout_s": timeout_s}})
                await self._snapshots.save_before_sleep()
                self._stop.set()
                return
            seen = now

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        """SIGHUP: read the file again and take over what can change while running."""
        if self._opening.ready:
            self._notifier.reloading()
        try:
            fresh = self._load_again()
        except ConfigError as error:
            log.error("configuration not reloaded", extra={"fields": {"error": str(error)}})
        else:
            self._take_over(fresh)
        if self._opening.ready:
            self._notifier.ready(self._reporter.line())

    def _take_over(self, fresh: Config) -> None:
        found = reload.compare(self._config, fresh)
        self._config = config = reload.taken_over(self._config, fresh, found.live)
        logs.setup(verbose=config.logging.verbose, format=config.logging.format)  # type: ignore[arg-type]
        settings = replica_settings(config)
        self._replica.change_limits(
            group_rows=settings.group_rows,
            max_transaction_bytes=settings.max_transaction_bytes,
            tombstone_retention_ms=settings.tombstone_retention_ms,
        )
        self._housekeeper.interval_s = config.cleanup_interval / 1000
        self._reloaded.set()
        if self._session is not None:
            self._session.poll_every(self._mode().polling_s)
            self._session.publish_again()
        fields = {"changed": list(found.live), "needs_restart": list(found.restart)}
        if found.restart:
            log.warning("configuration reloaded; part of it counts only after a restart", extra={"fields": fields})
        else:
            log.info("configuration reloaded", extra={"fields": fields})

    def _on_replaced(self) -> None:
        """Somebody put another file in the database's place, a restored backup for instance."""
        log.warning("the database file was replaced; starting again with the new one")
        self.start_again = True
        self._stop.set()

    def _on_commit(self) -> None:
        self._housekeeper.touched = True
        self._wakeup.set()

    # -- replication

    async def _replicate(self) -> None:
        """One session per connection, for ever."""
        await run_together(wait_for(self._opening.opened), self._make_streams(), self._install())
        while True:
            client = await self._uplink.wait_connected()
            settings = log_settings(self._config, self._server)
            self._membership.join(client, settings)
            snapshots = self._snapshots
            pause_s = RETRY_S
            session = self._session = Session(
                self._engine,
                client,
                settings,
                self._mode(),
                self._wakeup,
                self._progress,
                TOLERANCE_MS,
                bridge=snapshots.bridging(client, settings),
                on_caught_up=snapshots.caught_up,
                may_read=snapshots.may_read,
            )
            try:
                await run_together(
                    session.run(),
                    self._uplink.wait_disconnected(),
                    self._membership.announce(),
                    snapshots.serve(client, settings),
                )
            except Exception as error:  # whatever it is, the node tries again
                pause_s = self._endings.note(error)
            finally:
                self._progress.publishing = False
            await asyncio.sleep(pause_s if self._uplink.connected else 0)

    async def _make_streams(self) -> None:
        """Until the database is there: a hub without one serves its leaves all the same, its streams bounded."""
        while self._server is not None and self._server.plan.jetstream:
            client = await self._uplink.wait_connected()
            try:
                await ensure_streams(client, log_settings(self._config, self._server))
                await self._uplink.wait_disconnected()
            except LogError as error:
                self._trouble.warning("the streams cannot be made", {"reason": str(error)})
                await asyncio.sleep(RETRY_S)
        await self._opening.opened.wait()

    async def _install(self) -> None:
        """Until the database is there: fetch one, if the cluster has a snapshot and the application makes none."""
        while True:
            client = await self._uplink.wait_connected()
            settings = log_settings(self._config, self._server)
            await run_together(self._snapshots.install(client, settings), self._uplink.wait_disconnected())
            await asyncio.sleep(RETRY_S)

    def _mode(self) -> Mode:
        polling = self._config.polling_interval
        return Mode(self._config.publish, self._config.replicate, polling / 1000 if polling else None)

    # -- the operator's questions

    def _http_servers(self) -> list[HttpServer]:
        config, servers = self._config, []
        if config.health_check.enable:
            handler = health_handler(self._reporter.current, detailed=config.health_check.detailed)
            servers.append(HttpServer("health", config.health_check.bind, {config.health_check.path: handler}))
        if config.prometheus.enable:
            servers.append(HttpServer("metrics", config.prometheus.bind, {"/metrics": self._on_metrics}))
        return servers

    def _on_metrics(self) -> Response:
        self._reporter.fill_metrics()
        return Response(200, CONTENT_TYPE, self._metrics.render())

    async def _on_status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        await self._reporter.refresh()
        return self._reporter.current().to_json()

    async def _on_cluster(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"nodes": await self._membership.nodes()}
