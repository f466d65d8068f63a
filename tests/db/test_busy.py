"""How the daemon waits for the application's lock."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import apsw
import pytest

from harmonylite.db import sql

# An application that holds the lock nearly always: for 20 ms, then it lets go of it and takes it again.
APPLICATION = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
for number in range(1_000_000):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO t VALUES (NULL)")
    time.sleep(0.02)
    connection.execute("COMMIT")
    if not number:
        print("writes", flush=True)
    time.sleep(0.0002)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    connection.close()
    return path


def test_the_gap_between_two_transactions_is_found(path: Path) -> None:
    connection = sql.open_writer(path)
    application = subprocess.Popen([sys.executable, "-c", APPLICATION, str(path)], stdout=subprocess.PIPE)
    try:
        assert application.stdout is not None
        application.stdout.readline()
        waits = []
        for _ in range(5):
            started = time.monotonic()
            with sql.write_transaction(connection):
                waits.append(time.monotonic() - started)
            time.sleep(0.03)
        # SQLite's own handler looks every 100 ms: one look in a hundred hits the gap.
        assert sorted(waits)[2] < 1.0, waits
    finally:
        application.kill()
        application.wait()
        assert application.stdout is not None
        application.stdout.close()
        connection.close()


def test_a_lock_that_is_not_let_go_is_told_after_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "BUSY_TIMEOUT_MS", 300)
    connection, application = sql.open_writer(path), apsw.Connection(str(path))
    application.execute("BEGIN IMMEDIATE")
    for _ in range(2):  # each wait is one of its own
        started = time.monotonic()
        with pytest.raises(apsw.BusyError), sql.write_transaction(connection):
            pass
        assert 0.3 <= time.monotonic() - started < 2.0
    application.execute("COMMIT")
    with sql.write_transaction(connection):
        pass
    connection.close()
    application.close()
