"""The daemon: puts the parts together, starts and stops them, and answers the operator.

Nothing here waits for the network: the node is ready as soon as it watches its database (I1).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import apsw

from harmonylite import __version__, clock
from harmonylite.config import Config
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.db.tables import ForeignDatabaseError
from harmonylite.db.watch import Watch
from harmonylite.engine import Engine
from harmonylite.housekeeping import Housekeeper
from harmonylite.observe import log as logs
from harmonylite.observe.control import AlreadyRunning, ControlError, ControlServer
from harmonylite.observe.health import health_handler
from harmonylite.observe.http import HttpServer, Response
from harmonylite.observe.log import Repeated
from harmonylite.observe.metrics import CONTENT_TYPE, Metrics
from harmonylite.observe.notify import Notifier
from harmonylite.observe.status import summary
from harmonylite.replication import Mode, Progress, Session, Wakeup
from harmonylite.report import Reporter
from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.stream.log import LogError, LogSettings
from harmonylite.stream.registry import DuplicateNode, NodeEntry, Registry
from harmonylite.stream.server import BundledServer
from harmonylite.stream.server_config import store_limit
from harmonylite.stream.server_settings import ServerSettings, SettingsError
from harmonylite.tasks import cancelled, run_together
from harmonylite.timekeeping import Timekeeper
from harmonylite.uplink import Uplink

log = logging.getLogger(__name__)

# How far ahead of the stream's time a version may be before it is bounded (DESIGN 8).
TOLERANCE_MS = 60_000
# What SIGTERM leaves for publishing what is pending.
LAST_CALL_S = 5.0
# Between two tries to open a database that is not there or locked, or to use streams that are not.
RETRY_S = 1.0
ANNOUNCE_S = 10.0
DAY_MS = 86_400_000


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    logs.setup(verbose=config.logging.verbose, format=config.logging.format)  # type: ignore[arg-type]
    daemon = Daemon(config)
    try:
        code = asyncio.run(daemon.main())
        if daemon.start_again:
            # The same process begins anew, as a supervisor sees it: nothing of the old file is left in it.
            os.execv(sys.executable, sys.orig_argv)
        return code
    except AlreadyRunning as error:
        log.error("not started", extra={"fields": {"reason": str(error)}})
        return 1
    except (SettingsError, ValueError) as error:
        log.error("wrong configuration", extra={"fields": {"error": str(error)}})
        return 2


class Daemon:
    """One node, from start to stop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._metrics = Metrics(config.prometheus.namespace, config.prometheus.subsystem)
        self._time = Timekeeper(TOLERANCE_MS)
        self._replica = Replica(config.db_path, _replica_settings(config))
        self._engine = Engine(self._replica, self._time, self._metrics, compress=config.replication_log.compress)
        self._progress = Progress()
        self._wakeup = Wakeup()
        self._opened = asyncio.Event()
        self._stop = asyncio.Event()
        self.start_again = False
        leaf = not config.external and bool(config.nats.leaf_servers)
        self._uplink = Uplink(leaf=leaf)
        self._server = None
        if not config.external:
            self._server = BundledServer(ServerSettings.from_config(config), self._uplink.server_changed)
        self._connection = self._uplink.connection = Connection(ClientSettings.from_config(config), self._urls)
        self._registry: Registry | None = None
        self._notifier = Notifier()
        self._trouble = Repeated(log, 600.0)
        self._reporter = Reporter(config, self._engine, self._progress, self._uplink, self._server)
        self._housekeeper = Housekeeper(config, self._engine, self._uplink, self._reporter, self._notifier)

    def _urls(self) -> tuple[str, ...]:
        if self._server is None:
            return self._config.nats.urls
        return (self._server.url,) if self._server.url else ()

    # -- life cycle

    async def main(self) -> int:
        """Everything, until somebody asks to stop."""
        control = ControlServer(self._config.db_path, {"status": self._on_status, "cluster": self._on_cluster})
        await control.start()  # first: it is also the guard against a second daemon on this database
        servers = self._http_servers()
        watch = Watch(self._config.db_path, self._on_commit)
        self._catch_signals()
        log.info(
            "starting",
            extra={"fields": {"version": __version__, "node_id": self._config.node_id, "db": self._config.db_path}},
        )
        try:
            for server in servers:
                await server.start()
            watch.start()
            if self._server is not None:
                await self._server.start()
            await self._connection.start()
            self._notifier.ready("starting")
            code = await self._work()
        finally:
            self._notifier.stopping("stopping")
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
        opening = asyncio.create_task(self._open())
        replicating = asyncio.create_task(self._replicate())
        keeping = asyncio.create_task(self._housekeeper.run(self._opened, self._on_replaced))
        sleeping = asyncio.create_task(self._fall_asleep())
        stopping = asyncio.create_task(self._stop.wait())
        tasks = {opening, replicating, keeping, sleeping}
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

    async def _open(self) -> None:
        """Open the database, however long that takes; raises only for what waiting cannot mend."""
        complain = Repeated(log, 600.0)
        while True:
            try:
                await self._engine.open()
                break
            except ForeignDatabaseError:
                raise
            except apsw.Error as error:
                reason = f"{error}"
                if not self._config.db_path.exists():
                    reason = "there is no such file yet"
                self._reporter.database_error = reason
                complain.warning(
                    "the database cannot be opened; trying again", {"db": self._config.db_path, "reason": reason}
                )
                await asyncio.sleep(RETRY_S)
        self._reporter.database_error = None
        tables = self._replica.schema.tables
        for skipped in self._replica.skipped:
            log.warning("table is not replicated", extra={"fields": {"table": skipped.table, "reason": skipped.reason}})
        log.info("database open, capture installed", extra={"fields": {"tables": len(tables)}})
        self._opened.set()
        await self._reporter.refresh()
        self._notifier.status(summary(self._reporter.current()))

    async def _last_call(self) -> None:
        """Publish what can be published in a few seconds."""
        deadline = time.monotonic() + LAST_CALL_S
        while (
            self._config.publish
            and not self.start_again
            and self._opened.is_set()
            and self._uplink.connected
            and time.monotonic() < deadline
            and self._progress.publishing
        ):
            self._wakeup.set()
            if await self._pending() == 0:
                return
            await asyncio.sleep(0.05)

    async def _pending(self) -> int | None:
        """Pending rows; None if the database does not tell."""
        try:
            return await self._engine.pending()
        except apsw.Error as error:
            self._trouble.warning("pending rows cannot be counted", {"error": str(error)})
            return None

    async def _fall_asleep(self) -> None:
        """`sleep_timeout`: exit after a while without any change, for hosts that scale to zero."""
        timeout_s = self._config.sleep_timeout / 1000
        if not timeout_s:
            await self._stop.wait()
            return
        seen = (-1, -1)
        while True:
            now = (self._metrics.published.value, self._metrics.applied.value)
            if now == seen and self._opened.is_set() and await self._pending() == 0:
                log.info("no change for a while, stopping", extra={"fields": {"sleep_timeout_s": timeout_s}})
                self._stop.set()
                return
            seen = now
            await asyncio.sleep(timeout_s)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        """SIGHUP: read the file again and take over what can change while running (logging)."""
        from harmonylite.config import ConfigError, load

        self._notifier.reloading()
        try:
            fresh = load(self._config.file)
        except ConfigError as error:
            log.error("configuration not reloaded", extra={"fields": {"error": str(error)}})
        else:
            self._config = replace(self._config, logging=fresh.logging)
            logs.setup(verbose=fresh.logging.verbose, format=fresh.logging.format)  # type: ignore[arg-type]
            log.info("configuration reloaded: logging")
        self._notifier.ready(summary(self._reporter.current()))

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
        await self._opened.wait()
        while True:
            client = await self._uplink.wait_connected()
            settings = self._log_settings()
            self._registry = Registry(client, settings)
            session = Session(self._engine, client, settings, self._mode(), self._wakeup, self._progress, TOLERANCE_MS)
            try:
                await run_together(session.run(), self._uplink.wait_disconnected(), self._announce(self._registry))
            except LogError as error:
                self._progress.error = str(error)
                self._trouble.warning("replication waits", {"reason": str(error)})
            except Exception as error:
                # Whatever it is, the node goes on doing its local job and tries again.
                self._progress.error = f"{type(error).__name__}: {error}"
                log.error(
                    "replication failed; it starts again",
                    exc_info=log.isEnabledFor(logging.DEBUG),
                    extra={"fields": {"error": self._progress.error}},
                )
            finally:
                self._progress.publishing = False
            await asyncio.sleep(RETRY_S if self._uplink.connected else 0)

    def _mode(self) -> Mode:
        polling = self._config.polling_interval
        return Mode(self._config.publish, self._config.replicate, polling / 1000 if polling else None)

    def _log_settings(self) -> LogSettings:
        config = self._config
        plan = self._server.plan if self._server else None
        return LogSettings(
            node_id=config.node_id,
            subject_prefix=config.nats.subject_prefix,
            stream_prefix=config.nats.stream_prefix,
            shards=config.replication_log.shards,
            replicas=config.replication_log.replicas,
            domain=plan.domain if plan else config.nats.domain or None,
            compress=config.replication_log.compress,
            max_bytes=self._stream_bytes(),
            update_existing=config.replication_log.update_existing,
        )

    def _stream_bytes(self) -> int:
        """A stream discards its oldest messages before the server's store is full: then it would refuse new ones."""
        if self._server is None or not self._server.plan.jetstream:
            return -1  # whoever has the store decides
        store = store_limit(self._config.data_dir, self._config.nats.max_store)
        return store * 8 // 10 // self._config.replication_log.shards

    async def _announce(self, registry: Registry) -> None:
        """Tell the cluster about this node; a second live node with our id makes both say so."""
        while True:
            try:
                await registry.ensure_bucket()
                await registry.announce(self._entry())
                self._reporter.fault = None
            except DuplicateNode as error:
                self._reporter.fault = str(error)
                self._trouble.error("this node id is used twice", {"reason": str(error)})
            except LogError as error:
                log.debug("registry not reached", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(ANNOUNCE_S)

    def _entry(self) -> NodeEntry:
        current = self._reporter.current()
        return NodeEntry(
            node_id=self._config.node_id,
            instance_id=self._replica.instance_id,
            version=__version__,
            hostname=socket.gethostname(),
            schema=self._replica.schema.fingerprint(),
            pending_rows=current.pending_rows,
            position=dict(self._progress.positions),
            seen_ms=clock.wall_ms(),
        )

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
        if self._registry is None or not self._uplink.connected:
            raise ControlError("this node is offline: the cluster cannot be asked")
        entries = await self._registry.nodes()
        return {"nodes": [_entry_json(entry) for entry in entries]}


def _replica_settings(config: Config) -> ReplicaSettings:
    return ReplicaSettings(
        node_id=config.node_id,
        publish=config.publish,
        include=config.tables.include,
        exclude=config.tables.exclude,
        group_rows=config.scan_max_changes,
        max_transaction_bytes=config.max_transaction_bytes,
        tolerance_ms=TOLERANCE_MS,
        tombstone_retention_ms=round(config.tombstone_retention * DAY_MS),
        boot_id=clock.boot_id(),
    )


def _entry_json(entry: NodeEntry) -> dict[str, Any]:
    return {
        "node_id": entry.node_id,
        "status": "alive" if entry.alive else "silent",
        "last_seen": logs.rfc3339((entry.stored_ms or entry.seen_ms) / 1000),
        "version": entry.version,
        "hostname": entry.hostname,
        "pending_rows": entry.pending_rows,
        "schema": entry.schema,
        "position": dict(entry.position),
    }
