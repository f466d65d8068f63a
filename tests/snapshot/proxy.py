"""A network between a store and its client: slow, broken, or a black hole; and services that refuse."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

_PIECE = 16 * 1024


@dataclass
class Proxy:
    """Passes TCP connections on to `far_port`, until they are to break.

    rate: bytes a second in each direction, None for no limit; cut_after: bytes of the client (up) or of the service
    (down) after which a connection is reset, while `cuts` is above 0; hole: connections are taken and nothing passes.
    """

    far_port: int
    port: int = 0
    rate: float | None = None
    cut_after_up: int | None = None
    cut_after_down: int | None = None
    cuts: float = float("inf")
    hole: bool = False
    up: int = 0
    down: int = 0
    connections: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        far_writer: asyncio.StreamWriter | None = None
        try:
            if self.hole:
                while await reader.read(_PIECE):
                    pass
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.far_port)
            self._open.add(far_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer, upwards=True)),
                asyncio.create_task(self._pump(far_reader, writer, upwards=False)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            for each in (writer, far_writer):
                if each is not None:
                    self._open.discard(each)
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upwards: bool) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_PIECE):
                limit = self.cut_after_up if upwards else self.cut_after_down
                if limit is not None and passed + len(data) > limit and self.cuts > 0:
                    self.cuts -= 1
                    return
                writer.write(data)
                await writer.drain()
                passed += len(data)
                if upwards:
                    self.up += len(data)
                else:
                    self.down += len(data)
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)

    def break_all(self) -> None:
        """Reset every connection."""
        for writer in tuple(self._open):
            writer.transport.abort()


@contextlib.asynccontextmanager
async def proxied(far_port: int, **options: object) -> AsyncIterator[Proxy]:
    """A proxy that listens at its `port`."""
    proxy = Proxy(far_port, **options)  # type: ignore[arg-type]
    listener = socket.socket()
    # A slow link, not a fast one into a large buffer; what is accepted inherits this.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(proxy.serve, sock=listener, limit=_PIECE)
    proxy.port = listener.getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.break_all()
        await asyncio.sleep(0)


@dataclass
class Refusing:
    """An HTTP service that gives every request the same answer, and remembers the requests' heads."""

    status: str
    body: bytes
    port: int = 0
    heads: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                lines = (
                    f"HTTP/1.1 {self.status}",
                    "Content-Type: application/xml",
                    f"Content-Length: {len(self.body)}",
                )
                writer.write("\r\n".join([*lines, "", ""]).encode() + self.body)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def refusing(status: str, code: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Refusing]:
    """A service that answers everything with an error of S3: `403 Forbidden`, `ExpiredToken`."""
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no\nreason</Message></Error>'
    service = Refusing(status, text.encode())
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0, ssl=tls)
    service.port = server.sockets[0].getsockname()[1]
    try:
        yield service
    finally:
        server.close()
