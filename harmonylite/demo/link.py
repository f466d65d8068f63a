"""A network link that can be cut: a small TCP proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

# How long the far side may take to answer before the visitor is sent away.
_CONNECT_TIMEOUT_S = 5.0


class Link:
    """Passes TCP connections from `port` on to `far_port`, both on 127.0.0.1, until it is cut.

    While it is cut, connections end as soon as they begin. A thread per connection and direction: there is one
    connection.
    """

    def __init__(self, far_port: int) -> None:
        self._far = ("127.0.0.1", far_port)
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._up = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread(self._accept)

    def cut(self) -> None:
        """End every connection and let no other begin."""
        with self._lock:
            self._up = False
            for end in self._ends:
                _shut(end)

    def mend(self) -> None:
        """Let connections through again."""
        with self._lock:
            self._up = True

    def close(self) -> None:
        """Cut it for good and give the port back."""
        self.cut()
        _shut(self._listener)  # wakes the thread in accept(); close() alone would not
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._thread(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        """One connection, from beginning to end."""
        with near, contextlib.suppress(OSError):
            far = socket.create_connection(self._far, _CONNECT_TIMEOUT_S)
            far.settimeout(None)
            with far, self._counted(near, far) as passes:
                if passes:
                    back = self._thread(_pump, far, near)
                    _pump(near, far)
                    back.join()

    @contextlib.contextmanager
    def _counted(self, *ends: socket.socket) -> Iterator[bool]:
        """Among those that `cut` ends. Yields False if it did already."""
        with self._lock:
            passes = self._up
            self._ends.update(ends)
        try:
            yield passes
        finally:
            with self._lock:
                self._ends.difference_update(ends)

    @staticmethod
    def _thread(run: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=arguments, name="link", daemon=True)  # type: ignore[arg-type]
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
