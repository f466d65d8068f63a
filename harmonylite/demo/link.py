"""A network link that can be cut: a small TCP proxy."""

from __future__ import annotations

import contextlib
import socket
import threading

# How long the target may take to answer before the visitor is sent away.
_CONNECT_TIMEOUT_S = 5.0


class Link:
    """Passes TCP connections from a port of its own on to `target_port`, both on 127.0.0.1, until it is cut.

    A cut link behaves like a router without uplink that answers for the far side: connections end, new ones are
    refused at once. One thread per direction and connection: there is one connection.
    """

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._changing = threading.Lock()
        self._open: set[socket.socket] = set()
        self._up = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="link", daemon=True).start()

    def cut(self) -> None:
        """End every connection and let no other begin."""
        with self._changing:
            self._up = False
            for end in self._open:
                # Not close(): that would leave a thread that waits in recv() waiting.
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        with self._changing:
            self._up = True

    def close(self) -> None:
        """Cut it for good and give the port back."""
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(near,), name="link", daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        """Serve one connection from beginning to end."""
        try:
            far = socket.create_connection(self._target, _CONNECT_TIMEOUT_S)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with near, far, self._registered(near, far) as passes:
            if passes:
                back = threading.Thread(target=_pump, args=(far, near), name="link", daemon=True)
                back.start()
                _pump(near, far)
                back.join()

    @contextlib.contextmanager
    def _registered(self, *ends: socket.socket):  # type: ignore[no-untyped-def]
        with self._changing:
            passes = self._up
            if passes:
                self._open.update(ends)
        try:
            yield passes
        finally:
            with self._changing:
                self._open.difference_update(ends)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends, then end the other side too."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
