"""What systemd hears, through a socket that stands in for its own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonylite.observe.notify import Notifier, watchdog_interval


@pytest.fixture(params=["file", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = str(tmp_path / "notify") if request.param == "file" else f"@harmonylite-test-{os.getpid()}"
        listener.bind(name.replace("@", "\0", 1))
        listener.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listener


@pytest.fixture
def notifier(systemd: socket.socket) -> Iterator[Notifier]:
    made = Notifier()
    yield made
    made.close()


def heard(systemd: socket.socket) -> list[str]:
    return systemd.recv(4096).decode().split("\n")


def nothing_more(systemd: socket.socket) -> bool:
    systemd.setblocking(False)
    try:
        systemd.recv(1)
    except BlockingIOError:
        return True
    return False


def test_a_life(systemd: socket.socket, notifier: Notifier) -> None:
    notifier.ready("offline, 0 rows pending")
    assert heard(systemd) == ["READY=1", "STATUS=offline, 0 rows pending"]
    notifier.status("online, 0 pending")
    assert heard(systemd) == ["STATUS=online, 0 pending"]
    notifier.watchdog()
    assert heard(systemd) == ["WATCHDOG=1"]
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    first, second = heard(systemd)
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.ready()
    assert heard(systemd) == ["READY=1"]
    notifier.stopping("publishing 5 rows")
    assert heard(systemd) == ["STOPPING=1", "STATUS=publishing 5 rows"]
    assert nothing_more(systemd)


def test_the_same_status_is_sent_once(systemd: socket.socket, notifier: Notifier) -> None:
    for text in ("a", "a", "b", "a"):
        notifier.status(text)
    assert [heard(systemd) for _ in range(3)] == [["STATUS=a"], ["STATUS=b"], ["STATUS=a"]]
    assert nothing_more(systemd)


def test_status_is_utf8_and_cannot_smuggle_an_assignment(systemd: socket.socket, notifier: Notifier) -> None:
    notifier.status("Zürich → 東京\nMAINPID=1")
    assert heard(systemd) == ["STATUS=Zürich → 東京 MAINPID=1"]


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.ready("x")
    notifier.watchdog()
    notifier.stopping()


def test_nothing_is_sent_after_close(systemd: socket.socket, notifier: Notifier) -> None:
    notifier.close()
    notifier.watchdog()
    notifier.close()
    assert nothing_more(systemd)


def test_a_vanished_manager_does_no_harm(systemd: socket.socket, notifier: Notifier) -> None:
    systemd.close()
    notifier.status("still here")


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("30000000", None, 15.0),
        ("3000000", "own", 1.5),
        ("3000000", "1", None),
        (None, None, None),
        ("0", None, None),
        ("soon", None, None),
        ("3000000", "me", None),
    ],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_interval() == interval
