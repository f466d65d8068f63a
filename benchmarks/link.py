"""A TCP link between two nodes that counts what travels over it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_HOST = "127.0.0.1"
_PIECE = 256 << 10


class CountedLink:
    """Passes connections to `port` on to `far_port`, both on 127.0.0.1, until the `with` block ends.

    there, back: bytes so far, to the far port and from it.
    """

    def __init__(self, far_port: int) -> None:
        self._far_port = far_port
        self._listener = socket.create_server((_HOST, 0))
        self._ends: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        self.there = self.back = 0

    @property
    def bytes(self) -> int:
        """In both directions."""
        return self.there + self.back

    def __enter__(self) -> CountedLink:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection((_HOST, self._far_port))
                except OSError:  # the hub is down: the leaf tries again
                    near.close()
                    continue
                self._ends += [near, far]
                threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, there: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                # Each direction has its one thread, and `there` and `back` one writer for each connection.
                if there:
                    self.there += len(piece)
                else:
                    self.back += len(piece)
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
