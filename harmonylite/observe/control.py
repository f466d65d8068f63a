"""The local control channel between a running daemon and `harmonylite status` and its kin.

A stream socket in the abstract Unix namespace, named after the database's real path: there is no file to
clean up or to find stale, no limit on the path's length, and the kernel gives a name to one process at a
time, so holding it also guards against two daemons on one database. Limits of that (unix(7)): an abstract
name is visible, and guards, only within one network namespace, so not between containers that share a volume;
and any local user can take a name that is free, so `AlreadyRunning` tells who holds it.

A request is one line of JSON, `{"command": "status", ...}`; the answer is one line, `{"result": {...}}` or
`{"error": "..."}`.

Who may ask: root, the daemon's own user, and whoever may read the database by the permission bits of the file
and of the directories above it, since no answer says more than the database does. The kernel vouches for the
peer (SO_PEERCRED). Access control lists are not looked at; who has access through them alone asks through
sudo. Passing an open descriptor of the database would prove more, but must never be done: when a process
closes any descriptor of a file, it loses all its POSIX locks on it, SQLite's included.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harmonylite.observe.log import Repeated

log = logging.getLogger(__name__)

Document = dict[str, Any]
ControlHandler = Callable[[Document], Awaitable[Document]]

REQUEST_LIMIT_BYTES: Final = 65536
RESPONSE_LIMIT_BYTES: Final = 64 << 20
READ_TIMEOUT_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 5.0
MAX_CONNECTIONS: Final = 16

_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h, Linux 4.13; Python has no name for it
_UCRED: Final = struct.Struct("iII")  # pid, uid, gid
# What a user namespace (the unit's PrivateUsers=) shows for every id it does not map: nobody in particular.
_OVERFLOW_ID: Final = 65534


class ControlError(Exception):
    """Something about a control request went wrong; the text is for the operator."""


class ControlUnavailable(ControlError):  # noqa: N818
    """No daemon listens for this database (in this network namespace)."""


class ControlFailed(ControlError):  # noqa: N818
    """A daemon listens, but refused, failed or did not answer."""


class AlreadyRunning(ControlError):  # noqa: N818
    """Another process holds the name of this database: `pid` (0: unknown or in another namespace), `uid`."""

    def __init__(self, db_path: Path, pid: int, uid: int) -> None:
        super().__init__(
            f"{db_path}: another daemon (process {pid or 'unknown'}, user {uid}) already runs on this"
            " database; stop it first"
        )
        self.pid = pid
        self.uid = uid


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a Unix socket. `gids`: its primary and supplementary groups."""

    pid: int
    uid: int
    gids: frozenset[int]


def socket_name(db_path: Path) -> bytes:
    """The abstract name of a database: equal for every path that leads to the same real path."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(db_path))).hexdigest()
    return b"\0harmonylite/" + digest[:32].encode()


def may_ask(peer: Peer, db_path: Path) -> bool:
    """The rule of this module's docstring."""
    if peer.uid in (0, os.geteuid()):
        return True
    real = Path(os.path.realpath(db_path))
    try:
        reachable = all(_permits(folder.stat(), peer, stat.S_IXOTH) for folder in real.parents)
        return reachable and _permits(real.stat(), peer, stat.S_IROTH)
    except OSError:
        return False


def _permits(state: os.stat_result, peer: Peer, wanted: int) -> bool:
    """Whether the permission bits give the peer `wanted`, a bit of the class "other"; as the kernel does,
    only the first class that fits counts."""
    if state.st_uid == peer.uid != _OVERFLOW_ID:
        return bool(state.st_mode & wanted << 6)
    if state.st_gid in peer.gids - {_OVERFLOW_ID}:
        return bool(state.st_mode & wanted << 3)
    return bool(state.st_mode & wanted)


def _peer_of(connection: socket.socket) -> Peer:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    try:
        # Python allows at most 1024 bytes here: a peer in more than 256 groups counts with its primary one.
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        groups = b""
    return Peer(pid, uid, frozenset({gid, *(one for (one,) in struct.iter_unpack("I", groups))}))


class ControlServer:
    """Answers requests about one database.

    `handlers`: per command a coroutine function from the request to the result. It may raise `ControlError`,
    whose text goes to the client. It is cancelled by `close`, not by a client that hangs up.
    """

    def __init__(self, db_path: Path, handlers: Mapping[str, ControlHandler]) -> None:
        self._db_path = db_path
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._refused = Repeated(log, 60.0)

    async def start(self) -> None:
        """Take the database's name and listen. `AlreadyRunning` when another process holds it."""
        name = socket_name(self._db_path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(name)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            holder = _holder(name)
            raise AlreadyRunning(self._db_path, holder.pid, holder.uid) from None
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=REQUEST_LIMIT_BYTES)

    async def close(self) -> None:
        """Give the name back and cancel what is being answered."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            peer = _peer_of(writer.get_extra_info("socket"))
            writer.write(await self._answer(peer, reader))
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), WRITE_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # cancelled by `close` alone; asyncio 3.11 reports a task of its server that ends as cancelled
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _answer(self, peer: Peer, reader: asyncio.StreamReader) -> bytes:
        # Before anything is read, so that a stranger's bytes are never parsed.
        if not may_ask(peer, self._db_path):
            self._refused.warning("control request refused", {"pid": peer.pid, "uid": peer.uid})
            return _error(f"user {peer.uid} may not read it: ask as root or as the daemon's user")
        try:
            line = await asyncio.wait_for(reader.readline(), READ_TIMEOUT_S)
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        command = request.get("command") if isinstance(request, dict) else None
        if not isinstance(command, str):
            return _error("the request is not one line of JSON with a command")
        handler = self._handlers.get(command)
        if handler is None:
            return _error(f"unknown command {command!r}: this daemon knows {', '.join(sorted(self._handlers))}")
        try:
            return _line({"result": await handler(request)})
        except ControlError as error:
            return _error(str(error))
        except Exception as error:
            log.exception("control command failed", extra={"fields": {"command": command}})
            return _error(f"{command} failed: {error!r}; the daemon's log has more")


def _line(document: Document) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _error(text: str) -> bytes:
    return _line({"error": text})


def _holder(name: bytes) -> Peer:
    """Who listens at the name; pid 0 and nobody's uid when that cannot be learnt."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(name)
        except OSError:
            return Peer(0, _OVERFLOW_ID, frozenset())
        return _peer_of(connection)


def holder_pid(db_path: Path) -> int:
    """The process of the daemon that runs on this database; 0 if there is none, or it cannot be seen from here."""
    return _holder(socket_name(db_path)).pid


def query(db_path: Path, request: Document, timeout: float = 3.0) -> Document:
    """Ask the daemon that runs on this database: `{"command": ...}` -> the handler's result.

    `timeout`: seconds for each step (connecting, sending, each read). `ControlUnavailable` when no daemon
    listens, `ControlFailed` when one does but does not answer with a result.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(socket_name(db_path))
        except ConnectionRefusedError:
            raise ControlUnavailable(f"{db_path}: no daemon runs on this database") from None
        except OSError as error:
            raise ControlFailed(f"{db_path}: the daemon does not take requests: {error}") from None
        try:
            answer = _exchange(connection, _line(request))
        except TimeoutError:
            raise ControlFailed(f"{db_path}: the daemon did not answer within {timeout:g} s") from None
        except OSError as error:
            raise ControlFailed(f"{db_path}: the daemon hung up: {error}") from None
        except ValueError:
            raise ControlFailed(f"{db_path}: the daemon's answer is not understood") from None
    if isinstance(answer, dict) and isinstance(result := answer.get("result"), dict):
        return result
    reason = answer.get("error") if isinstance(answer, dict) else None
    raise ControlFailed(f"{db_path}: {reason or 'the daemon answered without a result'}")


def _exchange(connection: socket.socket, request: bytes) -> Any:
    """Send the request, return the parsed answer. OSError, or ValueError when it is too long or no JSON."""
    # Refused before it was read: the answer says why.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(request)
    answer = bytearray()
    while not answer.endswith(b"\n"):
        received = connection.recv(65536)
        if not received:
            raise ConnectionResetError(errno.ECONNRESET, "no answer")
        answer += received
        if len(answer) > RESPONSE_LIMIT_BYTES:
            raise ValueError("answer too long")
    return json.loads(answer)
