"""A TCP link that can be cut, or made half-open, between a client and a port of this machine."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from enum import Enum
from typing import Final

_LOOK_S: Final = 0.02
_CHUNK_BYTES: Final = 65536


class Link(Enum):
    """PASS: as a cable. CUT: connections are reset and new ones refused. SWALLOW: half-open, connections stay and
    are accepted, and nothing arrives at either end."""

    PASS = "pass"
    CUT = "cut"
    SWALLOW = "swallow"


class Proxy:
    """Listens on `port` of 127.0.0.1 and forwards to `target_port`. Threads; close() ends them."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._state = Link.PASS
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def set(self, state: Link) -> None:
        """Change the link. What a half-open link swallowed is lost with its connections, as on a real one."""
        self._state = state

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(_LOOK_S)
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            if self._state is Link.CUT:
                _reset(client)
            else:
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        if self._state is Link.SWALLOW:
            # A handshake through a half-open link never gets an answer; the client has to give up by itself.
            while self._state is Link.SWALLOW and not self._closed.wait(_LOOK_S):
                pass
            _reset(client)
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            _reset(client)
            return
        self._forward(client, server)
        _reset(client)
        _reset(server)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        """Until either end closes, or the link is cut; a link that swallowed something is dead afterwards."""
        swallowed = False
        other = {client: server, server: client}
        while not self._closed.is_set() and self._state is not Link.CUT:
            readable, _, _ = select.select([client, server], [], [], _LOOK_S)
            if self._state is Link.SWALLOW:
                swallowed = True
                if readable:
                    # Read by nobody: what is sent into a half-open link stays in the sender's kernel.
                    self._closed.wait(_LOOK_S)
                continue
            if swallowed:
                return
            for source in readable:
                try:
                    data = source.recv(_CHUNK_BYTES)
                    if not data:
                        return
                    other[source].sendall(data)
                except OSError:
                    return


def _reset(connection: socket.socket) -> None:
    """Close with RST: the peer notices at once."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
