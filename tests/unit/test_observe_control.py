"""The control channel: answers, refusals, and one daemon per database, between real processes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonylite.observe import control
from harmonylite.observe.control import (
    AlreadyRunning,
    ControlError,
    ControlFailed,
    ControlServer,
    ControlUnavailable,
    Peer,
    may_ask,
    query,
    socket_name,
)

STRANGER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

# argv: database, request, uid or "", gids
ASK = """
import json, os, sys
from pathlib import Path
from harmonylite.observe import control
db, request, uid, gids = sys.argv[1:]
if uid:
    groups = [int(gid) for gid in gids.split(",") if gid]
    os.setgroups(groups)
    os.setgid(int(uid))
    os.setuid(int(uid))
try:
    print(json.dumps(control.query(Path(db), json.loads(request))))
except control.ControlError as error:
    print(type(error).__name__, error)
"""

# Holds the name of argv[1] until it is killed.
HOLD = """
import asyncio, sys
from pathlib import Path
from harmonylite.observe.control import ControlServer
async def main():
    await ControlServer(Path(sys.argv[1]), {}).start()
    print("holding", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def db() -> Iterator[Path]:
    """A database file in a directory that every user can reach (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="harmonylite-test-", dir="/tmp"))
    folder.chmod(0o755)
    path = folder / "app.db"
    path.touch()
    path.chmod(0o600)
    yield path
    shutil.rmtree(folder)


async def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"echo": request, "pid": os.getpid()}


async def refuse(request: dict[str, Any]) -> dict[str, Any]:
    raise ControlError("no snapshot while offline")


async def fail(request: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("oops")


async def unspeakable(request: dict[str, Any]) -> dict[str, Any]:
    return {"x": object()}


async def large(request: dict[str, Any]) -> dict[str, Any]:
    return {"x": "y" * 3_000_000}


async def never(request: dict[str, Any]) -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


HANDLERS = {
    "echo": echo,
    "refuse": refuse,
    "fail": fail,
    "unspeakable": unspeakable,
    "large": large,
    "never": never,
}


async def ask_as(db: Path, request: dict[str, Any], uid: int | None = None, gids: str = "") -> str:
    """What a client process prints: the result as JSON, or the error's name and text."""
    asker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ASK, str(db), json.dumps(request), str(uid or ""), gids),
        stdout=subprocess.PIPE,
    )
    out, _ = await asker.communicate()
    assert asker.returncode == 0
    return out.decode().strip()


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


def with_server(db: Path, body: Any) -> Any:
    """Run `await body(server)` beside a server for `db`."""

    async def main() -> Any:
        server = ControlServer(db, HANDLERS)
        await server.start()
        try:
            return await body(server)
        finally:
            await server.close()

    return asyncio.run(main())


def ask_here(db: Path, request: dict[str, Any], timeout: float = 3.0) -> dict[str, Any]:
    async def body(_: ControlServer) -> dict[str, Any]:
        return await asyncio.to_thread(query, db, request, timeout)

    result: dict[str, Any] = with_server(db, body)
    return result


def test_another_process_gets_an_answer(db: Path) -> None:
    request = {"command": "echo", "table": "Zürich\n", "n": 2**63 - 1}
    answer = json.loads(with_server(db, lambda _: ask_as(db, request)))
    assert answer == {"echo": request, "pid": os.getpid()}


def test_a_large_answer_arrives_whole(db: Path) -> None:
    assert len(ask_here(db, {"command": "large"})["x"]) == 3_000_000


def test_without_a_daemon(db: Path) -> None:
    with pytest.raises(ControlUnavailable, match="no daemon runs on this database") as caught:
        query(db, {"command": "echo"})
    assert str(db) in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"command": "refuse"}, "no snapshot while offline"),
        ({"command": "fail"}, "fail failed: RuntimeError"),
        ({"command": "unspeakable"}, "unspeakable failed: TypeError"),
        ({"command": "nonsense"}, "unknown command 'nonsense': this daemon knows echo, fail, "),
        ({"command": ["echo"]}, "not one line of JSON with a command"),
        ({}, "not one line of JSON with a command"),
        ({"command": "echo", "x": "y" * 100_000}, "not one line of JSON with a command"),
    ],
)
def test_failures_reach_the_client_in_words(db: Path, request_: dict[str, Any], text: str) -> None:
    with pytest.raises(ControlFailed) as caught:
        ask_here(db, request_)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b"\xff\n", b"[" * 60000 + b"\n", b"{}"])
def test_nonsense_is_answered_with_an_error(db: Path, line: bytes) -> None:
    def talk() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(socket_name(db))
            client.sendall(line)
            client.shutdown(socket.SHUT_WR)
            return client.makefile("rb").read()

    answer = with_server(db, lambda _: asyncio.to_thread(talk))
    assert json.loads(answer) == {"error": "the request is not one line of JSON with a command"}


def test_a_daemon_that_does_not_answer(db: Path) -> None:
    with pytest.raises(ControlFailed, match=r"did not answer within 0\.1 s"):
        ask_here(db, {"command": "never"}, timeout=0.1)


def test_a_failing_handler_is_logged_with_its_traceback(db: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ControlFailed):
        ask_here(db, {"command": "fail"})
    (record,) = [record for record in caplog.records if record.name == "harmonylite.observe.control"]
    assert record.exc_info and record.levelno == logging.ERROR


def test_silent_and_excess_clients_do_not_keep_others_out(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(control, "MAX_CONNECTIONS", 2)

    async def body(server: ControlServer) -> None:
        silent = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for client in silent:
            client.connect(socket_name(db))
        await until(lambda: len(server._connections) == 2)
        with pytest.raises(ControlFailed, match="hung up"):
            await asyncio.to_thread(query, db, {"command": "echo"})
        await until(lambda: not server._connections)
        assert (await asyncio.to_thread(query, db, {"command": "echo"}))["pid"] == os.getpid()
        for client in silent:
            client.close()

    with_server(db, body)


def test_close_cancels_a_running_command_and_gives_the_name_back(db: Path) -> None:
    async def body(server: ControlServer) -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        asking = asyncio.create_task(asyncio.to_thread(query, db, {"command": "never"}, 10))
        await until(lambda: server._connections)
        await server.close()
        with pytest.raises(ControlFailed, match="hung up"):
            await asking
        with pytest.raises(ControlUnavailable):
            query(db, {"command": "echo"})
        assert reported == []
        await server.start()

    with_server(db, body)


def test_two_daemons_on_one_database(db: Path) -> None:
    """The second is told who the first is; a killed one leaves nothing behind; a link is the same database."""
    link = db.parent / "link.db"
    link.symlink_to(db)
    assert socket_name(link) == socket_name(db) != socket_name(db.parent / "other.db")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(db)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        try:
            assert holder.stdout.readline() == b"holding\n"
            with pytest.raises(AlreadyRunning, match=rf"process {holder.pid}, user {os.geteuid()}\)") as caught:
                asyncio.run(ControlServer(link, HANDLERS).start())
            assert (caught.value.pid, caught.value.uid) == (holder.pid, os.geteuid())
        finally:
            holder.send_signal(signal.SIGKILL)
    with_server(link, lambda _: ask_as(db, {"command": "echo"}))


def test_the_name_fits_however_long_the_path_is(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 5, "app.db")
    deep.parent.mkdir(parents=True)
    assert json.loads(with_server(deep, lambda _: ask_as(deep, {"command": "echo"})))["pid"] == os.getpid()


@needs_root
def test_a_stranger_is_refused_before_the_request_is_read(db: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer = with_server(db, lambda _: ask_as(db, {"command": "echo"}, STRANGER))
    assert answer.startswith("ControlFailed") and f"user {STRANGER} may not read it" in answer
    (record,) = caplog.records
    assert record.__dict__["fields"]["uid"] == STRANGER


@needs_root
def test_a_user_who_may_read_the_database_is_served(db: Path) -> None:
    db.chmod(0o604)
    assert with_server(db, lambda _: ask_as(db, {"command": "echo"}, STRANGER)).startswith("{")
    db.parent.chmod(0o700)
    assert with_server(db, lambda _: ask_as(db, {"command": "echo"}, STRANGER)).startswith("ControlFailed")


@needs_root
def test_supplementary_groups_count(db: Path) -> None:
    os.chown(db, 0, 7777)
    db.chmod(0o640)
    assert with_server(db, lambda _: ask_as(db, {"command": "echo"}, STRANGER, "5,7777")).startswith("{")
    assert with_server(db, lambda _: ask_as(db, {"command": "echo"}, STRANGER, "5,7778")).startswith("ControlFailed")


def test_who_may_ask_by_permission_bits(db: Path) -> None:
    group = db.stat().st_gid
    member = Peer(1, STRANGER, frozenset({group}))
    other = Peer(1, STRANGER, frozenset({group + 1}))
    allowed = {}
    for mode in (0o600, 0o640, 0o604, 0o644):
        db.chmod(mode)
        allowed[mode] = (may_ask(member, db), may_ask(other, db))
    assert allowed == {
        0o600: (False, False),
        0o640: (True, False),
        0o604: (False, True),
        0o644: (True, True),
    }
    db.chmod(0o600)
    assert may_ask(Peer(1, 0, frozenset()), db) and may_ask(Peer(1, os.geteuid(), frozenset()), db)
    assert not may_ask(other, db.parent / "absent.db")


def test_nobody_in_particular_is_not_an_owner() -> None:
    """In a user namespace, unmapped users and files all look like 65534: equal numbers prove nothing."""
    unmapped = os.stat_result((0o640, 0, 0, 1, 65534, 65534, 0, 0, 0, 0))
    peer = Peer(0, 65534, frozenset({65534}))
    assert not control._permits(unmapped, peer, 4)
    mapped = os.stat_result((0o640, 0, 0, 1, 1000, 1000, 0, 0, 0, 0))
    assert control._permits(mapped, Peer(0, 1000, frozenset()), 4)
