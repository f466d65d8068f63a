"""`status` and its kin against a daemon that answers on the control channel."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import apsw
import pytest

from harmonylite.cli.main import main
from harmonylite.observe.control import ControlServer
from harmonylite.observe.status import NodeStatus, SkippedTable, SnapshotInfo, StreamPosition, judge

Answers = dict[str, Callable[[], dict[str, Any]]]


def node(**changes: Any) -> NodeStatus:
    found = NodeStatus(
        node_id=7,
        version="0.1.0",
        uptime_seconds=3723,
        db_path="/var/lib/app/app.db",
        db_connected=True,
        nats_connected=True,
        offline_since=None,
        nats_url="nats://hub:4222",
        nats_error=None,
        cdc_installed=True,
        tables_tracked=12,
        skipped_tables=(SkippedTable("keyless", "it has no primary key"),),
        pending_rows=0,
        published_rows=1234,
        applied_rows=99,
        parked_rows=0,
        conflicts=0,
        lag_seconds=0.0123,
        clock_offset_seconds=-0.25,
        positions=(StreamPosition("harmonylite-changes-1", 40, 42),),
        catching_up=False,
        last_replicated_event_timestamp="2024-05-01T10:00:00Z",
        last_published_event_timestamp=None,
        snapshot=None,
        reasons=(),
    )
    return judge(replace(found, **changes))


@contextmanager
def daemon(path: Path, answers: Answers) -> Iterator[None]:
    """Something that answers for the database's daemon, in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()

    def handler(answer: Callable[[], dict[str, Any]]) -> Any:
        async def handle(request: dict[str, Any]) -> dict[str, Any]:
            return answer()

        return handle

    server = ControlServer(path, {name: handler(answer) for name, answer in answers.items()})
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    application = apsw.Connection(str(path))
    application.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)").fetchall()
    application.close()
    (tmp_path / "config.toml").write_text(f'db_path = "{path}"\nnode_id = 7\n')
    return path


def run(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments, "--config", str(path.parent / "config.toml")])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines(out: str) -> dict[str, str]:
    pairs = [line.partition(" ") for line in out.splitlines()]
    return {name: value.strip() for name, _, value in pairs if name}


def test_an_online_node(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shot = SnapshotInfo("2024-05-01T10:00:00Z", 7200.0, 3, 1_000_000, "nats")
    with daemon(path, {"status": lambda: node(snapshot=shot).to_json()}):
        code, out, err = run(path, capsys, "status")
    assert (code, err) == (0, "")
    found = lines(out)
    assert found["status"] == "healthy"
    assert found["daemon"] == "running for 1 h 2 min, version 0.1.0"
    assert found["database"] == "/var/lib/app/app.db, 12 tables replicated"
    assert found["nats"] == "connected to nats://hub:4222"
    assert found["pending"] == "0 rows"
    assert found["published"] == "1,234 rows"
    assert found["applied"].startswith("99 rows, the last written 2024-0")
    assert found["lag"] == "0.012 s"
    assert found["position"] == "harmonylite-changes-1 40 of 42"
    assert found["snapshot"] == "2 h old, by node 3, 1.0 MB in nats"
    rescued = replace(shot, store="s3", in_mirror=True)
    with daemon(path, {"status": lambda: node(snapshot=rescued).to_json()}):
        _, out, _ = run(path, capsys, "status")
    assert "by node 3, 1.0 MB in the mirror (s3)" in out
    assert found["clock"] == "-0.250 s against the server's"
    assert found["skipped"] == "keyless: it has no primary key"
    # Values stand below one another.
    assert len({len(line) - len(line.partition(" ")[2].lstrip()) for line in out.splitlines()}) == 1


def test_an_offline_node_says_since_when_what_waits_and_what_it_does(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    since = datetime.now(timezone.utc) - timedelta(hours=2, minutes=3, seconds=30)
    offline = node(
        nats_connected=False,
        offline_since=since.isoformat().replace("+00:00", "Z"),
        nats_error="connection refused",
        pending_rows=1500,
    )
    with daemon(path, {"status": offline.to_json}):
        code, out, _ = run(path, capsys, "status")
    assert code == 0
    found = lines(out)
    assert found["status"] == "degraded"
    when = since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert found["nats"] == f"offline since {when} (2 h 3 min): connection refused; keeps trying nats://hub:4222"
    assert found["pending"] == "1,500 rows; kept in the database, published once connected"


def test_json_is_what_the_daemon_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(path, {"status": lambda: {**node().to_json(), "news": 1}}):
        code, out, _ = run(path, capsys, "status", "--json")
    assert code == 0
    assert json.loads(out) == {"daemon_running": True, **node().to_json(), "news": 1}


def test_a_daemon_of_another_version_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(path, {"status": lambda: {"version": "9.0"}}):
        code, out, err = run(path, capsys, "status")
    assert (code, out) == (1, "")
    assert "another version (9.0)" in err


def test_the_cluster_is_a_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        {"version": "0.1.0", "node_id": 7, "status": "healthy", "pending_rows": 0, "lag_seconds": 0.5, "tables": ["x"]},
        {"version": "0.1.0", "node_id": 12, "status": "degraded", "pending_rows": 17, "lag_seconds": None, "host": "b"},
    ]
    with daemon(path, {"cluster": lambda: {"nodes": nodes}}):
        code, out, _ = run(path, capsys, "status", "--cluster")
        assert json.loads(run(path, capsys, "status", "--cluster", "--json")[1]) == nodes
    assert code == 0
    assert out.splitlines() == [
        "node id  status    version  pending rows  lag seconds  host",
        "7        healthy   0.1.0    0             0.500        -",
        "12       degraded  0.1.0    17            -            b",
    ]
    with daemon(path, {"cluster": lambda: {"nodes": []}}):
        assert run(path, capsys, "status", "--cluster") == (0, "no node is registered yet\n", "")


def test_a_daemon_that_fails_to_answer_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(path, {}):
        code, out, err = run(path, capsys, "status")
    assert (code, out) == (1, "")
    assert "unknown command" in err
    assert err.count("\n") == 1


def test_cleanup_is_refused_while_the_daemon_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(path, {"status": lambda: node().to_json()}):
        code, out, err = run(path, capsys, "cleanup")
    assert (code, out) == (1, "")
    assert "stop it first" in err
    with daemon(path, {}):
        assert run(path, capsys, "cleanup")[0] == 1


def test_doctor_knows_the_ports_of_its_own_daemon(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        with (path.parent / "config.toml").open("a") as file:
            file.write(f'publish = false\n[health_check]\nenable = true\nbind = "127.0.0.1:{port}"\n')
        with daemon(path, {"status": lambda: node().to_json()}):
            code, out, _ = run(path, capsys, "doctor")
    assert code == 0, out
    assert f"127.0.0.1:{port} is in use, by the daemon that runs" in out
    assert "ok    daemon: running, healthy" in out


def test_doctor_tells_a_stranger_on_a_port_from_the_daemon(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        port = int(stranger.stdout.readline())
        with (path.parent / "config.toml").open("a") as file:
            file.write(f'publish = false\n[health_check]\nenable = true\nbind = "127.0.0.1:{port}"\n')
        # A child of the daemon's, as its nats-server is.
        with daemon(path, {"status": lambda: node().to_json()}):
            code, out, _ = run(path, capsys, "doctor")
        assert code == 0, out
        assert f"127.0.0.1:{port} is in use, by the daemon that runs" in out
        with daemon(path, {"status": lambda: node().to_json()}), pytest.MonkeyPatch.context() as patch:
            patch.setattr("harmonylite.cli.checks.holder_pid", lambda _: os.getppid())
            code, out, _ = run(path, capsys, "doctor")
        stranger.stdin.close()  # type: ignore[union-attr]
    assert code == 1
    assert f"127.0.0.1:{port} is in use by process {stranger.pid} (python" in out


def test_doctor_fails_when_the_daemon_is_unhealthy(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(path, {"status": lambda: node(cdc_installed=False).to_json()}):
        code, out, _ = run(path, capsys, "doctor", "--json")
    assert code == 1
    found = {(check["check"], check["level"]) for check in json.loads(out)}
    assert {("daemon", "fail"), ("capture", "fail")} <= found


def test_a_node_without_a_snapshot_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(**changes: object) -> dict[str, str]:
        with daemon(path, {"status": lambda: node(**changes).to_json()}):
            return lines(run(path, capsys, "status")[1])

    assert shown()["snapshot"] == "none yet"
    assert shown(nats_connected=False)["snapshot"] == "none known", "the store was not asked"
    file = path.parent / "config.toml"
    file.write_text(file.read_text() + "[snapshot]\nenabled = false\n")
    assert "snapshot" not in shown()
