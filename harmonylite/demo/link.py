"""A network link that can be cut: a small TCP proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

_HOST = "127.0.0.1"
# How long the far side may take to answer before the visitor is sent away.
_CONNECT_TIMEOUT_S = 5.0


class Link:
    """Passes TCP connections from `port` on to `far_port`, both on 127.0.0.1, until it is cut.

    While it is cut, nobody listens at `port`. A thread per connection and direction: there is one connection.
    """

    def __init__(self, far_port: int) -> None:
        self._far_port = far_port
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        # Never listens, but keeps the port ours while the link is cut; whence SO_REUSEPORT, socket(7).
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind((_HOST, 0))
        self.port: int = self._reserved.getsockname()[1]
        self._listener: socket.socket | None = None
        self.mend()

    def cut(self) -> None:
        """End every connection and let no other begin."""
        with self._lock:
            listener, self._listener = self._listener, None
            for end in self._ends:
                _shut(end)
        if listener is not None:
            _shut(listener)  # wakes the thread in accept(), which close() alone would not
            listener.close()

    def mend(self) -> None:
        """Let connections through again."""
        with self._lock:
            if self._listener is None:
                self._listener = socket.create_server((_HOST, self.port), reuse_port=True)
                _thread(self._accept, self._listener)

    def close(self) -> None:
        """Cut it for good and give the port back."""
        self.cut()
        self._reserved.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = listener.accept()
                _thread(self._serve, listener, near)

    def _serve(self, listener: socket.socket, near: socket.socket) -> None:
        """One connection, from beginning to end."""
        with near, contextlib.suppress(OSError):
            far = socket.create_connection((_HOST, self._far_port), _CONNECT_TIMEOUT_S)
            far.settimeout(None)
            with far, self._counted(listener, near, far) as passes:
                if passes:
                    back = _thread(_pump, far, near)
                    _pump(near, far)
                    back.join()

    @contextlib.contextmanager
    def _counted(self, listener: socket.socket, *ends: socket.socket) -> Iterator[bool]:
        """Among those that `cut` ends. Yields False if it came before."""
        with self._lock:
            passes = listener is self._listener
            self._ends.update(ends)
        try:
            yield passes
        finally:
            with self._lock:
                self._ends.difference_update(ends)


def _thread(run: Callable[..., None], *arguments: socket.socket) -> threading.Thread:
    thread = threading.Thread(target=run, args=arguments, name="link", daemon=True)
    thread.start()
    return thread


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until one side ends, then end both."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
