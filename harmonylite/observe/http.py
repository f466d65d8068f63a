"""A small HTTP server for the two endpoints that only ever answer GET: health and metrics.

One answer per connection, then it is closed. What a client can take is bounded: bytes of request, seconds,
connections. Handlers run on the event loop and must not block.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final, NamedTuple

from harmonylite.config import split_address
from harmonylite.observe.log import Repeated

log = logging.getLogger(__name__)

REQUEST_LIMIT_BYTES: Final = 8192
READ_TIMEOUT_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 5.0
MAX_CONNECTIONS: Final = 32
BIND_RETRY_S: Final = 10.0


class Response(NamedTuple):
    """What a handler answers with."""

    status: int
    content_type: str
    body: bytes


Handler = Callable[[], Response]


class HttpServer:
    """Serves `routes` (path -> handler) at `bind`; `name` says in the log which endpoint it is.

    `bind`: `host:port` or `[v6]:port`; without a host every address, IPv4 and IPv6. ValueError for anything else.
    """

    def __init__(
        self, name: str, bind: str, routes: Mapping[str, Handler], *, bind_retry_s: float = BIND_RETRY_S
    ) -> None:
        self._name = name
        self._bind = bind
        self._host, self._port = split_address(bind, any_port=True)
        self._routes = dict(routes)
        self._bind_retry_s = bind_retry_s
        self._server: asyncio.Server | None = None
        self._retry: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._bind_failed = Repeated(log, 600.0)
        self._handler_failed = Repeated(log, 60.0)

    async def start(self) -> None:
        """Listen. An address that cannot be had now (port in use) is logged and tried again until `close`: an
        endpoint for the operator must not keep the daemon from its work."""
        if not await self._try_listen():
            self._retry = asyncio.create_task(self._keep_trying())

    async def close(self) -> None:
        """Stop listening and drop open connections."""
        tasks = [*self._connections, *([self._retry] if self._retry else [])]
        if self._server is not None:
            self._server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server = self._retry = None

    @property
    def port(self) -> int | None:
        """The port it listens on, None while it does not."""
        if self._server is None or not self._server.sockets:
            return None
        return int(self._server.sockets[0].getsockname()[1])

    async def _keep_trying(self) -> None:
        while True:
            await asyncio.sleep(self._bind_retry_s)
            if await self._try_listen():
                return

    async def _try_listen(self) -> bool:
        where = {"endpoint": self._name, "bind": self._bind}
        try:
            if self._host:
                self._server = await asyncio.start_server(
                    self._serve, self._host, self._port, limit=REQUEST_LIMIT_BYTES
                )
            else:
                self._server = await asyncio.start_server(
                    self._serve, sock=_listen_everywhere(self._port), limit=REQUEST_LIMIT_BYTES
                )
        except OSError as error:
            self._bind_failed.error(
                "http endpoint cannot listen, trying again",
                {**where, "error": error.strerror or error, "retry_in_s": self._bind_retry_s},
            )
            return False
        log.info("http endpoint listens", extra={"fields": where})
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            writer.write(await self._answer(reader))
            writer.close()
            # A client that does not read what it asked for must not hold its place for ever.
            await asyncio.wait_for(writer.wait_closed(), WRITE_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # cancelled by `close` alone; asyncio 3.11 reports a task of its server that ends as cancelled
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_TIMEOUT_S)
        except asyncio.LimitOverrunError:
            return _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except asyncio.TimeoutError:
            return _plain(HTTPStatus.REQUEST_TIMEOUT)
        line = request.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if len(line) != 3 or not line[2].startswith("HTTP/1.") or not line[1].startswith("/"):
            return _plain(HTTPStatus.BAD_REQUEST)
        method, target, _ = line
        handler = self._routes.get(target.partition("?")[0])
        with_body = method != "HEAD"
        if handler is None:
            return _plain(HTTPStatus.NOT_FOUND, with_body=with_body)
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD")
        try:
            return _encode(handler(), with_body=with_body)
        except Exception as error:
            self._handler_failed.error(
                "http endpoint failed to answer",
                {"endpoint": self._name, "path": target, "error": repr(error)},
            )
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, with_body=with_body)


def _listen_everywhere(port: int) -> socket.socket:
    """One socket for IPv4 and IPv6, or for IPv4 alone where the kernel has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return socket.create_server(("", port))


def _plain(status: HTTPStatus, *headers: str, with_body: bool = True) -> bytes:
    response = Response(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode())
    return _encode(response, *headers, with_body=with_body)


def _encode(response: Response, *headers: str, with_body: bool) -> bytes:
    status = HTTPStatus(response.status)
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + (response.body if with_body else b"")
