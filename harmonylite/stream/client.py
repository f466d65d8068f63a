"""The daemon's connection to NATS: made in the background, made again when lost, for ever.

The client library's own reconnecting stays off; each connection is a client of its own. So nothing that was
published before a loss is sent after it, unseen; a fetch that waits when the connection breaks ends at once with
`ConnectionClosedError` instead of running out; and there is one way to lose a connection, not two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import nats.errors
from nats.aio.client import Client

from harmonylite.stream.client_settings import ClientSettings, connect_options
from harmonylite.stream.credentials import SettingsError
from harmonylite.stream.endpoint import Endpoint, Means, explain, parse_endpoint

__all__ = ["ClientSettings", "Connection"]

log = logging.getLogger(__name__)

Listener = Callable[[], Awaitable[None]]

_CLOSE_TIMEOUT_S = 2.0
_NO_SERVER_YET_S = 0.2
_SAME_ERROR_AGAIN_S = 600.0
_MOST_REMEMBERED = 100


class Connection:
    """A connection to NATS that is made again whenever it is lost.

    Listeners run one after another, in the order of what happened; keep them short, wake a task of your own.
    After each connect there is a new `client`: subscriptions and JetStream contexts of the old one are dead.
    """

    def __init__(self, settings: ClientSettings, urls: Callable[[], Sequence[str]] | None = None) -> None:
        """urls: called before each round, for servers whose address changes; none for now: an empty sequence."""
        self._settings = settings
        self._urls = urls or (lambda: settings.urls)
        self._on_connect: list[Listener] = []
        self._on_disconnect: list[Listener] = []
        self._task: asyncio.Task[None] | None = None
        self._client: Client | None = None
        self._closing = False
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._discovered: dict[str, Endpoint] = {}
        self._reported: dict[str, float] = {}
        self._last_error: str | None = None
        self._offline_since: float | None = time.time()
        self._endpoint: Endpoint | None = None

    def on_connect(self, listener: Listener) -> None:
        """Call `listener` after the first connect and after each further one."""
        self._on_connect.append(listener)

    def on_disconnect(self, listener: Listener) -> None:
        """Call `listener` after each loss, and when `close` ends a connection."""
        self._on_disconnect.append(listener)

    @property
    def connected(self) -> bool:
        """Can something be sent now?"""
        return self._client is not None and self._client.is_connected and not self._lost.is_set()

    @property
    def client(self) -> Client:
        """The present client. Raises ConnectionClosedError while there is none."""
        if self._client is None or not self.connected:
            raise nats.errors.ConnectionClosedError
        return self._client

    @property
    def server(self) -> str | None:
        """host:port of the server connected to."""
        return self._endpoint.address if self._endpoint and self.connected else None

    @property
    def last_error(self) -> str | None:
        """Why there is no connection, or what a server last refused; None once connected."""
        return self._last_error

    @property
    def offline_since(self) -> float | None:
        """Seconds since 1970, None while connected."""
        return self._offline_since

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        for name in ("nats.aio.client", "asyncio"):
            logging.getLogger(name).addFilter(_ONE_LINE)
        if self._task is None:
            self._closing = False
            self._task = asyncio.create_task(self._run(), name="nats connection")

    async def close(self) -> None:
        """Send what is written, disconnect and stop connecting."""
        task, self._task = self._task, None
        if task is not None:
            self._closing = True  # the library swallows a cancellation here and there
            self._lost.set()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def wait_connected(self) -> Client:
        """Wait, if need be for ever, until there is a connection; returns the client."""
        while not self.connected:
            await self._connected.wait()
            await asyncio.sleep(0)
        return self.client

    async def wait_disconnected(self) -> None:
        """Wait until the present connection is lost; returns at once if there is none."""
        if self.connected:
            await self._lost.wait()

    # The task

    async def _run(self) -> None:
        while not self._closing:
            endpoints = self._endpoints()
            pause = self._settings.reconnect_wait_s if endpoints else _NO_SERVER_YET_S
            for endpoint in endpoints:
                if client := await self._attempt(endpoint):
                    begun = time.monotonic()
                    await self._use(client, endpoint)
                    # A new round at once, unless this server takes connections only to drop them.
                    pause -= time.monotonic() - begun
                    break
            await asyncio.sleep(max(0.0, pause))

    def _endpoints(self) -> list[Endpoint]:
        """This round's addresses: the configured ones first."""
        try:
            found = {(endpoint := parse_endpoint(url)).address: endpoint for url in self._urls()}
        except ValueError as error:
            self._failed(f"[nats] urls: {error}")
            return []
        if not found:
            self._last_error = self._last_error or "the bundled nats-server does not listen yet"
        elif not self._settings.bundled:
            for address, endpoint in self._discovered.items():
                found.setdefault(address, endpoint)
        return list(found.values())

    async def _attempt(self, endpoint: Endpoint) -> _Client | None:
        """One try; a failure is reported and None."""
        client = _Client(require_tls=self._settings.uses_tls)
        errors: list[Exception] = []
        self._lost = lost = asyncio.Event()

        async def on_error(error: Exception) -> None:
            if client.is_connected:
                self._refused(self._explain(error, endpoint), error)
            errors.append(error)

        async def on_closed() -> None:
            lost.set()
            if lost is self._lost:
                self._connected.clear()

        try:
            await client.connect(**connect_options(self._settings, endpoint), error_cb=on_error, closed_cb=on_closed)
            if not client.is_connected:  # the server hung up between CONNECT and PONG
                raise errors[-1] if errors else nats.errors.UnexpectedEOF()
        except asyncio.CancelledError:
            await _abandon(client)
            raise
        except SettingsError as error:
            self._failed(str(error))
        except Exception as error:
            cause = errors[-1] if errors and isinstance(error, nats.errors.NoServersError) else error
            self._failed(self._explain(cause, endpoint, verified=client.wants_certificate))
        else:
            return client
        self._learn(client, endpoint)
        await _abandon(client)
        return None

    async def _use(self, client: Client, endpoint: Endpoint) -> None:
        """From a successful connect to the loss."""
        self._client, self._endpoint = client, endpoint
        self._last_error, self._offline_since = None, None
        self._reported.clear()
        self._connected.set()
        log.info("connected to NATS", extra={"fields": {"server": endpoint.address}})
        why = "the connection was closed"
        try:
            await self._tell(self._on_connect)
            why = await self._watch(client, endpoint)
        finally:
            self._lost.set()
            self._connected.clear()
            self._client, self._endpoint = None, None
            self._offline_since = time.time()
            self._learn(client, endpoint)
            await _abandon(client)
            if self._last_error is None:
                self._last_error = why
            if self._closing:  # by `close`, which is no trouble
                log.info("connection to NATS closed", extra={"fields": {"server": endpoint.address}})
            else:
                log.warning("connection to NATS lost", extra={"fields": {"server": endpoint.address, "error": why}})
            await self._tell(self._on_disconnect)

    async def _watch(self, client: Client, endpoint: Endpoint) -> str:
        """Wait for the loss, asking the server now and then whether it lives; returns what happened.

        The library's own pings are of no use on a half-open link: it would then wait, without a limit, for what
        was written to be sent.
        """
        settings = self._settings
        interval = settings.ping_interval_s or (2.0 if endpoint.is_local else 10.0)
        timeout = settings.pong_timeout_s or (4.0 if endpoint.is_local else 20.0)
        while not self._lost.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._lost.wait(), interval)
                break
            try:
                # Older versions have no rtt; newer ones' flush answers for a server when nobody reads any more.
                ping = getattr(client, "rtt", client.flush)
                await asyncio.wait_for(ping(timeout=int(timeout) + 1), timeout)
            except (asyncio.TimeoutError, nats.errors.Error, OSError):
                if not self._lost.is_set():
                    return f"{endpoint.address} did not answer for {timeout:g} s"
        error = client.last_error
        return self._explain(error, endpoint) if error else f"{endpoint.address} closed the connection"

    # Reports

    def _explain(self, error: BaseException, endpoint: Endpoint, *, verified: bool = False) -> str:
        settings = self._settings
        means = Means(
            has_login=bool(endpoint.token or endpoint.user or settings.user_name or settings.seed_file),
            has_certificate=bool(settings.cert_file),
            has_ca=bool(settings.ca_file),
            verified=verified,
        )
        return explain(error, endpoint, means)

    def _failed(self, text: str) -> None:
        """An attempt failed: worth a line when the reason is a new one, and now and then."""
        self._last_error = text
        fields = {"error": text, "again_in_s": self._settings.reconnect_wait_s}
        level = logging.WARNING if self._is_news(text) else logging.DEBUG
        log.log(level, "no connection to NATS", extra={"fields": fields})

    def _is_news(self, text: str) -> bool:
        now = time.monotonic()
        if now - self._reported.get(text, -_SAME_ERROR_AGAIN_S) < _SAME_ERROR_AGAIN_S:
            return False
        if len(self._reported) >= _MOST_REMEMBERED:
            self._reported.clear()
        self._reported[text] = now
        return True

    def _refused(self, text: str, error: Exception) -> None:
        """The server said no to something while connected, for example for want of permission."""
        if isinstance(error, nats.errors.UnexpectedEOF):
            return
        self._last_error = text
        if self._is_news(text):
            log.warning("NATS refused something", extra={"fields": {"error": text}})

    def _learn(self, client: Client, endpoint: Endpoint) -> None:
        """Remember the servers of a cluster that one of them named; they share its credentials."""
        for parts in client.discovered_servers:
            if parts.hostname:
                found = replace(
                    endpoint,
                    host=parts.hostname,
                    port=parts.port,
                    tls_host=endpoint.tls_host or endpoint.host,
                )
                self._discovered[found.address] = found

    async def _tell(self, listeners: list[Listener]) -> None:
        for listener in listeners:
            await _guarded(listener)


class _Client(Client):
    """Sends no credentials over a connection that was to be encrypted and is not."""

    def __init__(self, *, require_tls: bool) -> None:
        super().__init__()
        self._require_tls = require_tls

    @property
    def wants_certificate(self) -> bool:
        """Did the server say that it checks clients' certificates?"""
        return bool(self._server_info.get("tls_verify"))

    def _connect_command(self) -> bytes:
        if self._require_tls and not self._server_info.get("tls_required"):
            raise nats.errors.Error("the server offers no TLS, but certificates are set ([nats] ca_file, cert_file)")
        command: bytes = super()._connect_command()
        return command


async def _guarded(listener: Listener) -> None:
    """A listener's mistake must not end the connection."""
    try:
        await listener()
    except Exception as error:
        log.error("listener to the NATS connection failed", extra={"fields": {"error": repr(error)}})


class _OneLine(logging.Filter):
    """Makes the library's tracebacks one line, and drops asyncio's remark on how it ends TLS connections: they tell
    an operator nothing.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("returning true from eof_received()"):
            return False
        if record.exc_info and record.name.startswith("nats."):
            record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]!r}", ()
            record.exc_info = None
        return True


_ONE_LINE = _OneLine()


async def _abandon(client: Client) -> None:
    """Close `client`, by force if its peer no longer reads; the library would wait for that without a limit."""
    with contextlib.suppress(Exception):
        await asyncio.wait_for(client.close(), _CLOSE_TIMEOUT_S)
    writer = getattr(getattr(client, "_transport", None), "_bare_io_writer", None)
    if writer is not None:
        writer.transport.abort()
