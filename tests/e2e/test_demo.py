"""`harmonylite demo` as somebody who has just installed it runs it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonylite import demo
from harmonylite.demo import story
from harmonylite.demo.link import Link
from harmonylite.demo.screen import Screen
from harmonylite.demo.shop import TABLES, Ledger, Shop
from harmonylite.stream.server_process import StartError

COMMAND = [sys.executable, "-m", "harmonylite", "demo"]
# The promise is 30 s; a loaded machine gets twice that.
LIMIT_S = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the demo makes its folder. Afterwards no process that mentions it is left, whatever the test did."""
    yield tmp_path
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)


def start(folder: Path, *options: str, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen([*COMMAND, *options], stdout=output, stderr=subprocess.PIPE, text=True, env=environment)


def processes(folder: Path) -> list[int]:
    """Processes with a path in `folder` among their arguments: daemons and their servers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in arguments:
            found.append(int(entry.name))
    return found


def eventually(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the demo prints, up to the line with `text`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended before {text!r}: {seen}{process.stderr.read() if process.stderr else ''}")


def test_the_demo_shows_that_the_databases_converge_and_leaves_nothing_behind(folder: Path) -> None:
    begun = time.monotonic()
    process = start(folder)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, ""), out
    assert time.monotonic() - begun < LIMIT_S
    assert "IDENTICAL: all 3 databases hold the same" in out
    assert "NOT IDENTICAL" not in out
    table = re.findall(r"^   (office|north|south|expected) +(\d+ +\d+ +\d+ +[0-9a-f]{16})$", out, re.MULTILINE)
    assert [name for name, _ in table] == ["office", "north", "south", "expected"]
    assert len({row for _, row in table}) == 1
    assert re.search(r"^     pending +80 rows", out, re.MULTILINE)
    assert re.search(r"^     +id='coffee', price=320$", out, re.MULTILINE)
    assert re.search(r"^     +id='tea', price=210$", out, re.MULTILINE)
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 110
    assert not processes(folder)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_keep_leaves_databases_that_are_identical_and_nodes_that_run_again(folder: Path) -> None:
    process = start(folder, "--keep")
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, ""), out
    assert not processes(folder)
    (kept,) = folder.iterdir()
    assert str(kept) in out
    for table in TABLES:
        rows = [query(kept / name / "shop.db", f"SELECT * FROM {table} ORDER BY 1, 2") for name in NODES]
        assert len(rows[0]) > 5
        assert rows[0] == rows[1] == rows[2]
    prices = dict(query(kept / "south" / "shop.db", "SELECT id, price FROM products"))
    assert (prices["coffee"], prices["tea"], "umbrella" in prices) == (350, 240, False)

    commands = [line.strip().removeprefix("$ ") for line in out.splitlines() if " run --config " in line]
    assert len(commands) == 3
    nodes = [subprocess.Popen(["sh", "-c", f"exec {line}"], stderr=subprocess.DEVNULL) for line in commands]
    try:
        with sqlite3.connect(kept / "north" / "shop.db", timeout=10) as north:
            north.execute("UPDATE products SET price = 1 WHERE id = 'bread'")
        north.close()
        bread = "SELECT price FROM products WHERE id = 'bread'"
        eventually(lambda: query(kept / "south" / "shop.db", bread) == [(1,)])
    finally:
        for node in nodes:
            node.terminate()
        assert [node.wait(20) for node in nodes] == [0, 0, 0]


NODES = ("office", "north", "south")


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)],
)
def test_an_interrupted_demo_leaves_nothing_behind(folder: Path, number: signal.Signals) -> None:
    process = start(folder)
    read_until(process, "3. A transaction stays whole")
    assert len(processes(folder)) == 6  # three daemons, three servers
    process.send_signal(number)
    eventually(lambda: process.poll() is not None)
    assert process.returncode == 128 + number
    assert process.stderr is not None
    assert process.stderr.read() == "harmonylite: demo interrupted\n"
    assert not processes(folder)
    assert not list(folder.iterdir())
    process.communicate()


@pytest.mark.slow
def test_a_second_interrupt_does_not_disturb_the_cleaning(folder: Path) -> None:
    process = start(folder)
    read_until(process, "3. A transaction stays whole")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.returncode in (130, -signal.SIGINT)  # the latter: it was gone all but for Python's own exit
    assert not processes(folder)
    assert not list(folder.iterdir())
    process.communicate()


def test_daemons_end_with_a_demo_that_is_killed(folder: Path) -> None:
    process = start(folder)
    read_until(process, "2. Every node writes")
    process.kill()
    process.communicate()
    eventually(lambda: not processes(folder))


def test_a_reader_that_hangs_up_ends_the_demo(folder: Path) -> None:
    process = start(folder)
    read_until(process, "1. Three nodes start")
    assert process.stdout is not None
    process.stdout.close()
    eventually(lambda: process.poll() is not None, LIMIT_S)
    assert process.returncode == 0
    assert not processes(folder)
    assert not list(folder.iterdir())
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_daemon_that_dies_fails_the_demo_with_one_line(folder: Path) -> None:
    process = start(folder)
    read_until(process, "3. A transaction stays whole")
    (daemon,) = (
        pid
        for pid in processes(folder)
        if b"harmonylite\0run\0" in (text := Path(f"/proc/{pid}/cmdline").read_bytes()) and b"/south/" in text
    )
    os.kill(daemon, signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert re.fullmatch(r"harmonylite: demo failed: the daemon of south ended with code -9: .*\n", err)
    assert not list(folder.iterdir())
    assert not processes(folder)


def test_without_a_nats_server_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing() -> Path:
        raise StartError("no nats-server found: install one")

    monkeypatch.setattr(story, "find_binary", nothing)
    assert demo.main() == 1
    assert capsys.readouterr() == ("", "harmonylite: demo failed: no nats-server found: install one\n")


@pytest.fixture
def shops(tmp_path: Path) -> Iterator[tuple[Ledger, Shop, Shop]]:
    """A ledger and two shops that know nothing of each other; the first has written."""
    ledger = Ledger()
    north, south = (Shop(name, tmp_path / f"{name}.db", ledger) for name in ("north", "south"))
    north.add_products({"tea": 200, "bread": 320, "milk": 130})
    north.sell()
    yield ledger, north, south
    north.close()
    south.close()


def test_the_verdict_names_a_database_that_differs(
    shops: tuple[Ledger, Shop, Shop], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, north, south = shops
    contents = {"north": north.content(), "south": south.content()}
    assert not story.compare(Screen(), contents, ledger.content())
    assert "NOT IDENTICAL: other than what was written: south." in capsys.readouterr().out


def test_the_verdict_notices_what_is_missing_everywhere(
    shops: tuple[Ledger, Shop, Shop], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, _, south = shops
    assert not story.compare(Screen(), {"a": south.content(), "b": south.content()}, ledger.content())
    assert "NOT AS WRITTEN" in capsys.readouterr().out


def test_the_verdict_is_about_every_value_and_not_only_about_counts(shops: tuple[Ledger, Shop, Shop]) -> None:
    ledger, north, _ = shops
    before = north.content()
    assert story.compare(Screen(), {"north": before}, ledger.content())
    north.set_price("tea", 201)
    after = north.content()
    assert (after.counts, after != before) == (before.counts, True)
    assert not story.compare(Screen(), {"north": before}, ledger.content())


def test_a_torn_order_is_noticed(shops: tuple[Ledger, Shop, Shop], tmp_path: Path) -> None:
    _, north, _ = shops
    more = True
    looks = north.half_orders(lambda: more)
    assert next(looks) == (0, 1)
    connection = sqlite3.connect(tmp_path / "north.db", isolation_level=None)
    connection.execute("DELETE FROM order_lines WHERE line = 2")
    assert next(looks) == (1, 1)
    connection.execute("DELETE FROM orders")
    connection.close()
    assert next(looks) == (2, 0)  # its two lines
    more = False
    assert list(looks) == []


def test_a_link_that_is_cut_ends_connections_and_refuses_others() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link(server.getsockname()[1])
        for _ in range(2):
            near = socket.create_connection(("127.0.0.1", link.port), 5)
            far, _ = server.accept()
            near.sendall(b"ping")
            assert far.recv(9) == b"ping"
            far.sendall(b"pong")
            assert near.recv(9) == b"pong"
            link.cut()
            assert (near.recv(9), far.recv(9)) == (b"", b"")
            near.close()
            far.close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", link.port), 5)
            link.mend()
        link.close()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_and_for_those_who_like_it(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        Screen(terminal).title("hello")
        assert select.select([master], [], [], 5)[0]
        assert (b"\x1b[" in os.read(master, 100)) == coloured
    os.close(master)
