"""The command line as a user sees it: output, exit codes, one line per mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

import harmonylite
from harmonylite.cli import checks
from harmonylite.cli.command import duration, json_value, local_time, rfc3339, sql_value, writing
from harmonylite.cli.main import COMMANDS, build_parser, main
from harmonylite.config import Config
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import (
    Delivery,
    Group,
    Position,
    RawText,
    ReceivedGroup,
    Stamp,
    TableChanges,
    Undecodable,
    Unread,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a database `app.db`, replicated once and left by the daemon, and its `config.toml`."""
    path = tmp_path / "app.db"
    application = apsw.Connection(str(path))
    application.execute(
        "PRAGMA journal_mode=WAL; CREATE TABLE orders (id INTEGER PRIMARY KEY, item); CREATE TABLE keyless (x)"
    ).fetchall()
    replica = Replica(path, ReplicaSettings(node_id=7))
    replica.open()
    application.execute("INSERT INTO orders VALUES (1, 'mine'), (2, 'x')").fetchall()
    application.close()
    replica.absorb()
    position = Position("harmonylite-changes-1", "2024-01-01T00:00:00Z", 9, 1_700_000_000_000_000_000)
    older = TableChanges("orders", ("id",), ("id", "item"), ((1, b"\x00\xff"),), (Stamp(5, 3, 0, 0, 0),))
    unknown = TableChanges("stock", ("id",), ("id", "n"), (("a\nb", RawText(b"\xff")),), (Stamp(6, 3, 0, 0, 0),))
    group = Group(3, 1, (older, unknown))
    replica.apply(Delivery(position, (ReceivedGroup(group, 9, 1_700_000_000_000),)))
    replica.close()
    (tmp_path / "config.toml").write_text(f'db_path = "{path}"\nnode_id = 7\n')
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def cli(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command on the configuration of `folder`."""
    return lambda *arguments: run(capsys, *arguments, "--config", str(folder / "config.toml"))


def test_status_without_a_daemon_comes_from_the_database_alone(cli: Any, folder: Path) -> None:
    code, out, err = cli("status")
    assert (code, err) == (0, "")
    assert re.findall(r"^(\S+) +(.*)$", out, re.MULTILINE) == [
        ("node", "7"),
        ("daemon", "not running"),
        ("database", f"{folder / 'app.db'}, 1 table replicated"),
        ("pending", "2 rows; published after the next start"),
        ("parked", "1 row; harmonylite parked says why"),
        ("conflicts", "1 row; harmonylite conflicts lists them"),
        ("position", f"harmonylite-changes-1 9, stored {local_time(1_700_000_000_000)}"),
    ]
    code, out, err = cli("status", "--json")
    document = json.loads(out)
    assert (code, document["daemon_running"], document["status"], document["node_id"]) == (0, False, "stopped", 7)
    assert (document["pending_rows"], document["parked_rows"], document["conflicts"]) == (2, 1, 1)


def test_status_of_the_cluster_needs_the_daemon(cli: Any) -> None:
    code, out, err = cli("status", "--cluster")
    assert (code, out) == (1, "")
    assert "start it first" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "parked"])
def test_a_database_behind_a_closed_folder_is_one_line(
    cli: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def closed(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    # Root, who may run this, passes every closed folder.
    monkeypatch.setattr("harmonylite.db.inspect._has_wal", closed)
    code, out, err = cli(command)
    assert (code, out) == (1, "")
    assert str(folder / "app.db") in err and "Permission denied; ask as root" in err
    assert err.count("\n") == 1 and "HARMONYLITE_DEBUG" not in err


def test_status_of_a_missing_database_is_one_line(cli: Any, folder: Path) -> None:
    (folder / "app.db").unlink()
    code, out, err = cli("status")
    assert (code, out) == (1, "")
    assert err.startswith(f"harmonylite: {folder / 'app.db'}: there is no such file: ")
    assert err.count("\n") == 1


def test_conflicts_show_the_discarded_row(cli: Any) -> None:
    code, out, err = cli("conflicts")
    assert (code, err) == (0, "")
    first, second, third, fourth = out.splitlines()
    assert "orders (1)" in first
    assert second == f"    written by node 3 at {local_time(5)}.005"
    assert third.startswith("    lost to the one written by node 7 at ")
    assert fourth == "    id=1, item=x'00ff'"

    code, out, err = cli("conflicts", "--json", "--limit", "1")
    (conflict,) = json.loads(out)
    assert conflict["row"] == {"id": 1, "item": {"blob": "00ff"}}
    assert (conflict["table"], conflict["key"], conflict["node_id"]) == ("orders", [1], 3)
    assert "--limit N shows more" in err

    assert cli("conflicts", "--table", "stock") == (0, "no conflicts\n", "")


def test_parked_rows_show_their_reason(cli: Any) -> None:
    code, out, err = cli("parked")
    assert (code, err) == (0, "")
    # The line end in the key is escaped: one row, three lines.
    first, second, third = out.splitlines()
    assert "stock ('a\\nb')" in first
    assert "written by node 3" in second
    assert third == "    id='a\\nb', n='\\xff'"
    (parked,) = json.loads(cli("parked", "--json")[1])
    assert parked["row"] == {"id": "a\nb", "n": {"text": "ff"}}
    assert parked["reason"]
    assert cli("parked", "--table", "orders") == (0, "no parked rows\n", "")


def test_messages_of_a_newer_version_are_told(cli: Any, folder: Path) -> None:
    replica = Replica(folder / "app.db", ReplicaSettings(node_id=7))
    replica.open()
    message = Undecodable(10, b"HL", "message format 9 is unknown", Unread(1_700_000_000_000, 3, joined=False))
    replica.apply(Delivery(Position("harmonylite-changes-1", "2024-01-01T00:00:00Z", 10, 1), (), (message,)))
    replica.close()
    lines = cli("parked")[1].splitlines()
    assert "message 10 of stream harmonylite-changes-1: cannot be read" in lines[-2]
    assert "message format 9 is unknown" in lines[-2]
    assert f"sent by node 3 at {local_time(1_700_000_000_000)}" in lines[-1]
    assert "upgraded" in lines[-1]
    parked, unread = json.loads(cli("parked", "--json")[1])
    assert parked["table"] == "stock"
    assert (unread["stream"], unread["sequence"], unread["node_id"]) == ("harmonylite-changes-1", 10, 3)
    assert len(json.loads(cli("parked", "--table", "stock", "--json")[1])) == 1
    why = "1 message could not be read by this version, harmonylite parked says why: upgrade this node"
    assert f"missing    {why}" in cli("status")[1].splitlines()
    assert json.loads(cli("status", "--json")[1])["reasons"] == ["daemon: not running", why]
    assert f"warn  complete: {why}; until then it takes no snapshot" in cli("doctor")[1].splitlines()


def test_check_config_prints_what_is_in_force(cli: Any, folder: Path) -> None:
    with (folder / "config.toml").open("a") as file:
        file.write('seq_map_path = "x"\n[nats]\nuser_name = "me"\nuser_password = "hunter2"\n')
    code, out, err = cli("check-config")
    assert code == 0
    assert "node_id = 7" in out
    assert 'user_password = "********"' in out
    assert "seq_map_path is not needed" in err
    assert "hunter2" not in out + err
    document = json.loads(cli("check-config", "--json")[1])
    assert (document["valid"], document["config"]["node_id"]) == (True, 7)
    assert [note["line"] for note in document["notes"]] == [3]


def test_check_config_tells_what_is_missing_on_this_machine(cli: Any, folder: Path) -> None:
    file = folder / "config.toml"
    file.write_text(f'db_path = "{folder}/gone/app.db"\nnode_id = 7\n[nats]\nuser_name = "u"\n')
    code, _, err = cli("check-config")
    assert code == 0
    login, database = err.splitlines()
    assert login.startswith(f"harmonylite: note: {file}:4: nats.user_name is set and no password is, and `run` ")
    assert database.startswith(f"harmonylite: note: {file}:1: db_path its directory {folder}/gone does not exist on")
    notes = json.loads(cli("check-config", "--json")[1])["notes"]
    assert [note["key"] for note in notes] == ["nats.user_name", "db_path"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("leaf_servers = ['h']\ncluster_addr = ':1'\ncluster_peers = ['a', 'b']", "exclude each other"),
        ("user_name = 'u'\nuser_password = '$2a$11$x'", "is a bcrypt hash"),
        ("seed_file = 'config.toml'", "holds no user seed"),
    ],
)
def test_check_config_finds_what_the_daemon_would_refuse(cli: Any, folder: Path, lines: str, message: str) -> None:
    file = folder / "config.toml"
    lines = lines.replace("'config.toml'", f"'{file}'")
    file.write_text(f'db_path = "{folder / "app.db"}"\nnode_id = 7\n[nats]\n{lines}\n')
    code, out, err = cli("check-config")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"harmonylite: {file}: [nats] ") and message in err
    code, out, err = cli("run")  # the same, from the daemon
    assert code == 2
    assert message in err


def test_check_config_names_every_mistake_and_gives_2(cli: Any, folder: Path) -> None:
    (folder / "config.toml").write_text("publis = true\nnode_id = 0\n")
    code, out, err = cli("check-config")
    assert (code, out) == (2, "")
    assert [line.partition("config.toml")[2] for line in err.splitlines()] == [
        ": db_path is not set: it names the application's SQLite file",
        ":1: publis is not a key; did you mean publish?",
        f":2: node_id must be from 1 to {2**63 - 1}; it is 0",
    ]
    code, out, err = cli("check-config", "--json")
    assert (code, err) == (2, "")
    assert [problem["key"] for problem in json.loads(out)["problems"]] == ["db_path", "publis", "node_id"]


@pytest.mark.parametrize("command", ["run", "status", "cleanup", "conflicts", "parked"])
def test_every_command_stops_at_a_wrong_configuration(cli: Any, folder: Path, command: str) -> None:
    (folder / "config.toml").write_text("nodeid = 1\n")
    code, out, err = cli(command)
    assert (code, out) == (2, "")
    assert "did you mean node_id?" in err


def test_flags_win_over_the_file_before_and_after_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "config.toml")
    for arguments in (
        ["--config", file, "--node-id", "9", "check-config"],
        ["check-config", "--config", file, "--node-id", "9"],
        ["--node-id", "9", "check-config", "-config", file],
    ):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert "node_id = 9" in out
    code, _, err = run(capsys, "check-config", "--config", file, "--node-id", "0")
    assert code == 2
    assert "(on the command line)" in err


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """A module that another part of the program brings, reduced to what a command calls."""
    module = types.ModuleType(f"harmonylite.{name}")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, f"harmonylite.{name}", module)
    monkeypatch.setattr(harmonylite, name, module, raising=False)


def test_without_a_command_the_daemon_runs_as_the_go_flags_say(
    cli: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Config] = []

    def daemon_run(config: Config, reload: Callable[[], Config]) -> int:
        seen.extend((config, reload()))  # SIGHUP reads the file with what the command line overrides
        return 1

    install(monkeypatch, "daemon", run=daemon_run)
    file = str(folder / "config.toml")
    code, _, err = run(
        capsys,
        *("-config", file, "-node-id", "4", "-cluster-addr", "localhost:4221"),
        *("-cluster-peers", "nats://localhost:4222/,nats://localhost:4223/", "-pprof", ":6060"),
    )
    assert code == 1
    assert "-pprof is accepted and has no effect" in err
    config, again = seen
    assert config == again
    assert (config.node_id, config.nats.cluster_addr) == (4, "localhost:4221")
    assert config.nats.cluster_peers == ("nats://localhost:4222/", "nats://localhost:4223/")


@pytest.mark.parametrize("flag", ["-schema-status", "-schema-status-cluster"])
def test_go_flags_without_a_command_yet_say_so(folder: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, out, err = run(capsys, "-config", str(folder / "config.toml"), flag)
    assert (code, out) == (1, "")
    assert err.endswith("not available in this version\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["statsu"], "unknown command 'statsu'; did you mean status?"),
        (["--fast", "status"], "unrecognized arguments: --fast; see 'harmonylite status --help'"),
        (["status", "--jsn"], "unrecognized arguments: --jsn; did you mean --json?"),
        (["check-config", "my.toml"], "unrecognized arguments: my.toml; see 'harmonylite check-config --help'"),
        (["snapshot"], "snapshot needs one of save, list, restore, for example: harmonylite snapshot save"),
        (["setup"], "setup needs --db, for example: harmonylite setup --db /var/lib/myapp/app.db"),
        (["-config"], "argument --config: expected one argument; see 'harmonylite run --help'"),
        (["--node-id", "x", "status"], "argument --node-id: invalid int value: 'x'; see 'harmonylite --help'"),
        (
            ["conflicts", "--limit", "all"],
            "argument --limit: invalid int value: 'all'; see 'harmonylite conflicts --help'",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(capsys, *arguments) == (2, "", f"harmonylite: {message}\n")


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "help") == run(capsys, "--help")
    assert run(capsys, "help", "status") == run(capsys, "status", "--help")
    assert run(capsys, "help", "statsu")[0] == 2


def test_a_limit_that_shows_nothing_is_wrong_usage(cli: Any) -> None:
    assert cli("conflicts", "--limit", "0") == (2, "", "harmonylite: --limit must be 1 or more; it is 0\n")


def test_no_arguments_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "examples:" in err


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_ends_with_examples_that_parse(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    examples = out.partition("examples:\n")[2].splitlines()
    assert examples
    for line in examples:
        words = shlex.split(line)
        arguments = words[words.index("harmonylite", words.index("sudo") + 3 if "sudo" in words else 0) + 1 :]
        assert build_parser().parse_args(arguments).command.name == command


def test_an_unexpected_error_is_one_line_unless_asked_for(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config, reload: object) -> int:
        raise RuntimeError("two\nlines")

    install(monkeypatch, "daemon", run=broken)
    monkeypatch.delenv("HARMONYLITE_DEBUG", raising=False)
    assert cli("run") == (1, "", "harmonylite: RuntimeError: two lines (HARMONYLITE_DEBUG=1 shows where)\n")
    monkeypatch.setenv("HARMONYLITE_DEBUG", "1")
    code, _, err = cli("run")
    assert code == 1
    assert "Traceback" in err


def test_ctrl_c_gives_130(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: Config, reload: object) -> int:
        raise KeyboardInterrupt

    install(monkeypatch, "daemon", run=interrupted)
    assert cli("run") == (130, "", "")


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "harmonylite", "check-config", "--config", folder / "config.toml"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "version", "--json")
    document = json.loads(out)
    assert code == 0
    assert list(document) == ["harmonylite", "python", "sqlite", "apsw", "nats-server"]
    assert document["harmonylite"] == harmonylite.__version__
    assert document["sqlite"] == apsw.sqlitelibversion()
    assert re.fullmatch(r"\d+\.\d+\.\d+", document["nats-server"])
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("harmonylite  0.")


def test_cleanup_removes_what_is_ours(cli: Any, folder: Path) -> None:
    code, out, err = cli("cleanup", "--all")
    assert (code, out) == (1, "")
    assert "--force" in err
    code, out, err = cli("cleanup")
    assert (code, err) == (0, "")
    assert "2 rows not published yet" in out
    code, out, err = cli("cleanup", "--all", "--force", "--json")
    assert code == 0
    assert json.loads(out)["pending"] == 2
    application = apsw.Connection(str(folder / "app.db"))
    assert (
        application.execute("SELECT name FROM sqlite_schema WHERE name LIKE '\\_\\_harmony%' ESCAPE '\\'").fetchall()
        == []
    )
    assert application.execute("SELECT count(*) FROM orders").fetchall() == [(2,)]
    application.close()
    (folder / "app.db").unlink()
    code, out, err = cli("cleanup")
    assert (code, out) == (1, "")
    assert not (folder / "app.db").exists()


def test_cleanup_of_a_database_that_is_none_or_locked(cli: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "app.db"

    def locked(*_: object, **__: object) -> None:
        raise apsw.BusyError("database is locked")

    with monkeypatch.context() as patched:
        patched.setattr("harmonylite.cli.cleanup.cleanup", locked)
        code, _, err = cli("cleanup")
    assert (code, err) == (
        1,
        f"harmonylite: {path}: another program keeps the database locked; stop the application, try again\n",
    )
    path.write_bytes(b"no database at all, but long enough to be one" * 100)
    assert cli("cleanup") == (1, "", f"harmonylite: {path}: is not a SQLite database (or is encrypted)\n")


@pytest.mark.parametrize(("stdout", "code"), [(">&-", 0), ("> /dev/full", 1)])
def test_output_that_goes_nowhere(folder: Path, stdout: str, code: int) -> None:
    command = shlex.join([sys.executable, "-m", "harmonylite", "status", "--config", str(folder / "config.toml")])
    done = subprocess.run(["sh", "-c", f"{command} {stdout}"], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr == (
        ""
        if code == 0
        else "harmonylite: reading or writing: No space left on device (HARMONYLITE_DEBUG=1 shows where)\n"
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def levels(out: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for check in json.loads(out):
        found.setdefault(check["check"], set()).add(check["level"])
    return found


def test_doctor_finds_a_sound_device_sound(cli: Any, folder: Path) -> None:
    code, out, err = cli("doctor", "--json")
    found = levels(out)
    assert (code, err) == (0, "")
    assert not any("fail" in level for level in found.values())
    assert found["config"] == found["database"] == found["directory"] == found["journal"] == {"ok"}
    assert found["capture"] == found["nats-server"] == {"ok"}
    assert found["daemon"] == found["tables"] == {"warn"}
    code, out, err = cli("doctor")
    assert "warn  tables: keyless is not replicated: it has no primary key" in out
    # No unit reads this file: systemctl would start something else, or nothing.
    assert f"warn  daemon: not running; harmonylite run --config {folder / 'config.toml'}" in out


def test_doctor_says_what_is_wrong(cli: Any, folder: Path, taken_port: int) -> None:
    application = apsw.Connection(str(folder / "app.db"))
    application.execute('DROP TRIGGER "__harmonylite__orders_insert"; PRAGMA journal_mode=DELETE').fetchall()
    application.close()
    (folder / "config.toml").write_text(
        f"""
db_path = "{folder / "app.db"}"
node_id = 7
[nats]
server_binary = "/nowhere/nats-server"
leaf_servers = ["nats-leaf://me:hunter2@127.0.0.1:1"]
user_name = "me"
user_password = "hunter2"
[health_check]
enable = true
bind = "127.0.0.1:{taken_port}"
[prometheus]
enable = true
bind = "no.such.host.invalid:1"
[snapshot]
store = "file"
[snapshot.file]
path = "{folder}/nothing"
"""
    )
    (folder / "config.toml").chmod(0o644)
    code, out, err = cli("doctor", "--json")
    assert code == 1
    assert "hunter2" not in out + err
    found = levels(out)
    assert found["config"] == {"ok", "warn"}
    assert found["journal"] == found["capture"] == {"warn"}
    assert found["nats-server"] == found["snapshots"] == found["ports"] == {"fail"}
    assert f"127.0.0.1:{taken_port} is in use by process {os.getpid()} (" in out


def test_doctor_says_what_is_wrong_with_external_servers_and_a_missing_database(
    cli: Any, folder: Path, taken_port: int
) -> None:
    (folder / "app.db").unlink()
    lines = f'db_path = "{folder / "app.db"}"\nnode_id = 7\n[nats]\n'
    (folder / "config.toml").write_text(f'{lines}urls = ["nats://127.0.0.1:1"]\n')
    code, out, _ = cli("doctor", "--json")
    found = levels(out)
    assert (code, found["database"], found["nats"]) == (0, {"warn"}, {"warn"})
    (folder / "config.toml").write_text(f'{lines}urls = ["nats://127.0.0.1:1", "nats://127.0.0.1:{taken_port}"]\n')
    assert levels(cli("doctor", "--json")[1])["nats"] == {"warn"}  # it takes the connection and says nothing
    (folder / "app.db").write_bytes(b"no database at all, but long enough to be one" * 100)
    code, out, _ = cli("doctor", "--json")
    assert code == 1
    assert "is not a SQLite database" in out


def test_doctor_finds_damage(cli: Any, folder: Path) -> None:
    path = folder / "app.db"
    application = apsw.Connection(str(path))
    rows = "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)"
    columns = "CREATE TABLE large (id INTEGER PRIMARY KEY, v)"
    application.execute(f"{columns}; {rows} INSERT INTO large SELECT i, hex(randomblob(50)) FROM n").fetchall()
    application.close()
    assert levels(cli("doctor", "--json")[1])["damage"] == {"ok"}
    with path.open("r+b") as file:
        file.seek(-100 * 4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    code, out, _ = cli("doctor")
    assert code == 1
    assert f"fail  damage: {path} is damaged: " in out
    assert 'see "A card is corrupt" in docs/disaster-recovery.md' in out


def test_doctor_with_a_wrong_configuration(cli: Any, folder: Path) -> None:
    (folder / "config.toml").write_text("x = 1\n")
    code, out, _ = cli("doctor")
    assert code == 1
    assert "fail  config:" in out


MOUNTS = r"""22 1 179:2 / / rw,noatime - ext4 /dev/root rw
30 22 0:27 / /srv/my\040share rw - nfs4 server:/x rw
31 22 0:28 / /srv/ro ro,nosuid - ext4 /dev/sda1 ro
32 22 0:29 / /srv/twice rw - ext4 /dev/sda2 rw
33 22 0:30 / /srv/twice rw - tmpfs tmpfs rw
34 22 0:31 / /srv/card rw,noatime - ext4 /dev/mmcblk0p3 ro,errors=remount-ro
35 22 0:32 / /srv/card6 rw,noatime - ext4 /dev/mmcblk0p4 rw,errors=remount-ro,emergency_ro
"""


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    assert checks.mount_of(Path("/var/lib/x"), table) == ("ext4", ("rw", "noatime"))
    assert checks.mount_of(Path("/srv/my share/deep"), table)[0] == "nfs4"
    assert checks.mount_of(Path("/srv/my shares"), table)[0] == "ext4"
    assert "ro" in checks.mount_of(Path("/srv/ro"), table)[1]
    for card in ("card", "card6"):  # the kernel found errors
        assert "ro" in checks.mount_of(Path("/srv", card), table)[1]
    assert checks.mount_of(Path("/srv/twice/a"), table)[0] == "tmpfs"
    assert checks.mount_of(Path("/srv"), tmp_path / "nothing") == ("", ())
    assert checks.mount_of(tmp_path)[0]


def test_values_for_people_and_for_json() -> None:
    assert sql_value("it's\x1b[2J") == "'it''s\\x1b[2J'"
    assert sql_value("x" * 100) == "'" + "x" * 60 + "...'"
    assert sql_value(b"\x00" * 100).endswith("...'")
    assert sql_value(None) == "NULL"
    assert [json_value(value) for value in (1, 1.5, "a", None)] == [1, 1.5, "a", None]
    assert json_value(float("-inf")) == {"real": "-inf"}
    assert json_value(RawText(b"\xff")) == {"text": "ff"}


def test_times_that_no_calendar_has() -> None:
    assert rfc3339(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
    assert rfc3339(2**62) is None
    assert local_time(2**62) == f"{2**62} ms"
    assert writing(1_700_000_000_042, 3) == f"by node 3 at {local_time(1_700_000_000_042)}.042"
    assert writing(2**62, 3) == f"by node 3 at {2**62} ms"
    assert writing(0, 0) == "before the installation"
    assert [duration(seconds) for seconds in (0, 59.9, 125, 90061, -3)] == [
        "0 s",
        "59 s",
        "2 min 5 s",
        "1 d 1 h",
        "0 s",
    ]


def test_a_table_that_needs_the_applications_own_collation_is_told_and_why_its_rows_wait(
    cli: Any, folder: Path
) -> None:
    application = apsw.Connection(str(folder / "app.db"))
    application.createcollation("icu", lambda a, b: (a > b) - (a < b))
    application.execute("CREATE INDEX by_item ON orders (item COLLATE icu)").fetchall()
    application.close()
    replica = Replica(folder / "app.db", ReplicaSettings(node_id=7))
    replica.open()
    changes = TableChanges("orders", ("id",), ("id", "item"), ((3, "x"),), (Stamp(9, 3, 0, 0, 0),))
    position = Position("harmonylite-changes-1", "2024-01-01T00:00:00Z", 10, 1)
    replica.apply(Delivery(position, (ReceivedGroup(Group(3, 2, (changes,)), 10, 1_700_000_000_000),)))
    replica.close()
    first, written, waits, last = cli("parked", "--table", "orders")[1].splitlines()
    assert first.endswith("orders (3)  does not fit: no such collation sequence: icu")
    assert "written by node 3" in written
    assert (
        waits == "    waits until no index, CHECK or generated column of its table needs what only the application has"
    )
    assert last == "    id=3, item='x'"
    [warned] = [line for line in cli("doctor")[1].splitlines() if "orders: what other nodes write to it waits" in line]
    assert warned.startswith("warn  tables")
    assert "no such collation sequence: icu" in warned
