"""Starts after bad ends: how far apart, what ends the wait, what counts as a bad end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonylite import starts as module
from harmonylite.observe.notify import Notifier
from harmonylite.starts import Starts, distance


class Process:
    """What a new process of the service sees, with a clock of the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.waited: list[float] = []
        self._file = folder / "last-start"
        self._monkeypatch = monkeypatch
        self._pid = 100

    def start(self, *, same_process: bool = False) -> Starts:
        self._pid += 0 if same_process else 1
        self._monkeypatch.setattr(os, "getpid", lambda pid=self._pid: pid)
        self._monkeypatch.setattr(signal, "sigtimedwait", self._pass)
        started, begun = Starts(self._file, clock=lambda: self.now), self.now
        assert started.begin(Notifier())
        self.waited.append(self.now - begun)
        return started

    def _pass(self, signals: set[signal.Signals], seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(tmp_path, monkeypatch)


def test_the_distance_doubles_up_to_a_minute() -> None:
    assert [distance(bad) for bad in (1, 2, 3, 4, 5, 6, 5000)] == [5, 10, 20, 40, 60, 60, 60]


def test_each_bad_end_makes_the_next_start_wait_longer(process: Process) -> None:
    for _ in range(7):
        process.start()
        process.now += 1  # and is killed
    assert process.waited == [0, 4, 9, 19, 39, 59, 59]


def test_who_was_paused_long_enough_by_the_service_manager_does_not_wait_again(process: Process) -> None:
    for pause in (5, 10, 20, 40, 60, 60):
        process.start()
        process.now += pause
    assert process.waited == [0] * 6


def test_a_stop_is_a_good_end(process: Process) -> None:
    for _ in range(3):
        started = process.start()
        process.now += 1
    started.ended_well()
    process.start()
    process.now += 1
    process.start()
    assert process.waited == [0, 4, 9, 0, 4]


def test_who_has_run_well_begins_to_count_anew(process: Process) -> None:
    for seconds in (1, 1, 1, module.WELL_S, 1, 1):
        process.start()
        process.now += seconds
    # The third ran well: what ended it is the first bad end, and the fourth waits for nothing.
    assert process.waited == [0, 4, 9, 19, 0, 9]


def test_the_daemon_that_begins_anew_by_itself_is_no_new_start(process: Process) -> None:
    process.start()
    process.now += 1
    process.start(same_process=True)
    assert process.waited == [0, 0]


def test_killed_while_it_waits_it_still_counts(process: Process, tmp_path: Path) -> None:
    process.start()
    process.start()
    mark = json.loads((tmp_path / "last-start").read_text())
    assert (mark["bad"], mark["started_s"]) == (1, 1005.0)
    process.now = 1001.0  # the second never got beyond its wait
    process.start()
    assert process.waited[-1] == pytest.approx(1005 + 10 - 1001)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"started_s": 1, "bad": "x", "pid": 1}', '{"started_s": 1e9, "bad": 9, "pid": 1}']
)
def test_a_mark_that_means_nothing_delays_nobody(process: Process, tmp_path: Path, content: str) -> None:
    (tmp_path / "last-start").write_text(content)
    process.start()
    process.now += 1
    process.start()
    assert process.waited == [0, 4]


def test_a_runtime_directory_that_cannot_be_written_delays_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = Starts(tmp_path / "gone" / "last-start")
    assert started.begin(Notifier())
    started.ended_well()
    assert [record.message for record in caplog.records] == ["how the last start ended cannot be kept"]


def test_only_a_service_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        (("RUNTIME_DIRECTORY", None), ("NOTIFY_SOCKET", "/x")),
        (("RUNTIME_DIRECTORY", str(tmp_path)), ("NOTIFY_SOCKET", None)),
    ):
        for key, given in (name, value):
            monkeypatch.delenv(key, raising=False) if given is None else monkeypatch.setenv(key, given)
        assert Starts.of_service() is None


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Two bad ends behind us, and who listens."""
    folder = tmp_path / "run"
    folder.mkdir()
    mark = {"started_s": time.monotonic(), "bad": 1, "pid": 1}
    (folder / "last-start").write_text(json.dumps(mark))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"{folder}:{tmp_path}")
        yield listener


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_waits_no_longer(
    systemd: socket.socket, tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    waiting = threading.get_ident()

    def answer() -> None:
        # The first word is about the time it takes, the second for people; a reload ends no wait. To that thread alone:
        # whoever runs the tests has others, which the signal would end.
        heard.extend(systemd.recv(4096).decode() for _ in range(2))
        for each in (signal.SIGHUP, number):
            signal.pthread_kill(waiting, each)

    other = threading.Thread(target=answer)
    # What comes before it waits stays until then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        other.start()
        begun = time.monotonic()
        with caplog.at_level(logging.INFO, module.__name__):
            starts = Starts.of_service()
            assert starts is not None and not starts.begin(Notifier())
        assert time.monotonic() - begun < 5
    finally:
        other.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert heard[0].startswith("EXTEND_TIMEOUT_USEC=")
    assert heard[1].startswith("STATUS=waiting 10 s: the last 2 starts ended badly")
    assert [record.message for record in caplog.records] == [
        "the last starts ended badly; this one waits",
        "told to stop while it waited",
    ]
    assert not (tmp_path / "run" / "last-start").exists(), "the next start waits for nothing"
