"""`setup`: what it writes, what it leaves alone, and which permissions it finds missing. Needs no root."""

from __future__ import annotations

import importlib
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonylite.cli import permissions, setup
from harmonylite.cli.main import main
from harmonylite.cli.permissions import Account, Group, Missing, missing
from harmonylite.cli.toml_edit import EditRefused, with_values
from harmonylite.config import identity, load
from harmonylite.config.document import example

toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

# Nobody on this machine: neither the user who runs the tests, nor root, nor in any group of theirs.
DAEMON = Account("harmonylite", 54_321, 54_321, frozenset({54_321}))
# A group that files may be given here: root gives them any, everybody else the own one.
OURS = Group("ours", os.getegid() or 54_400)


def make(path: Path, mode: int) -> Path:
    """A directory (with the setgid bit or an x bit of the owner) or an empty file of our group."""
    if mode & stat.S_IXUSR:
        path.mkdir(parents=True)
    else:
        path.write_bytes(b"")
    os.chown(path, -1, OURS.gid)
    path.chmod(mode)
    return path


class Place:
    """A system below a temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc = root / "etc"
        self.units = root / "units"
        make(root / "srv", 0o750)
        self.folder = make(root / "srv" / "app", 0o2770)
        self.database = make(self.folder / "app.db", 0o660)
        self.config = self.etc / "config.toml"
        self.drop_in = self.units / "harmonylite.service.d" / "database.conf"


# The fixture below replaces it: the directories above a temporary one are for their owner alone.
CLOSED_PARENTS = permissions._closed_parents


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path)
    monkeypatch.setattr(setup, "CONFIG_DIRECTORY", place.etc)
    monkeypatch.setattr(setup, "UNIT_DIRECTORY", place.units)
    monkeypatch.setattr(permissions, "TEMPORARY", ())
    monkeypatch.setattr(permissions, "HOMES", (tmp_path / "home",))
    known = permissions.account
    monkeypatch.setattr(permissions, "account", lambda name: DAEMON if name == "harmonylite" else known(name))
    monkeypatch.setattr(permissions, "group_of", lambda database, daemon: OURS)
    monkeypatch.setattr(permissions, "_closed_parents", lambda folder, daemon: iter(()))
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["setup", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_new_configuration_and_drop_in(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--db", place.database, "--leaf-servers", "nats-leaf://hub:7422", "--node-id", 7)
    assert (code, err) == (0, "")
    config = load(place.config)
    assert (config.db_path, config.node_id, config.notes) == (place.database, 7, ())
    assert [str(server) for server in config.nats.leaf_servers] == ["nats-leaf://hub:7422"]
    assert config.nats.store_dir == "/var/lib/harmonylite"
    lines = place.drop_in.read_text().splitlines()
    assert lines[-3:] == ["[Service]", f"ReadWritePaths={place.folder}", "SupplementaryGroups=ours"]
    assert [line.split()[0] for line in out.splitlines()] == ["wrote", "wrote", "ok", "next"]
    assert stat.S_IMODE(place.config.stat().st_mode) == 0o644
    assert not [path for path in place.etc.iterdir() if path != place.config], "temporary files are left"

    code, out, _ = run(capsys, "--db", place.database)
    assert (code, [line.split("  ")[0] for line in out.splitlines()][:2]) == (0, ["as it was", "as it was"])


def test_an_instance_has_files_of_its_own(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "machine-id").write_text("0123456789abcdef" * 2)
    monkeypatch.setattr(identity, "MACHINE_ID_FILES", (tmp_path / "machine-id",))
    code, out, _ = run(capsys, "--db", place.database, "--instance", "shop-2")
    assert code == 0
    nats = load(place.etc / "shop-2.toml").nats
    assert nats.store_dir == "/var/lib/harmonylite/shop-2"
    # Two databases must never meet in one stream.
    assert (nats.subject_prefix, nats.stream_prefix) == ("harmonylite-change-log-shop-2", "harmonylite-changes-shop-2")
    assert load(place.etc / "shop-2.toml").snapshot.nats.bucket == "harmonylite-snapshots-shop-2"
    assert "the same name on every node" in out
    # Nor may two nodes of one machine have one id; asked again, it stays.
    first = load(place.etc / "shop-2.toml").node_id
    assert run(capsys, "--db", place.database, "--instance", "other")[0] == 0
    assert len({first, load(place.etc / "other.toml").node_id, identity.node_id_of("0123456789abcdef" * 2)}) == 3
    assert run(capsys, "--db", place.database, "--instance", "shop-2")[0] == 0
    assert load(place.etc / "shop-2.toml").node_id == first
    assert (place.units / "harmonylite@shop-2.service.d" / "database.conf").is_file()
    assert "systemctl enable harmonylite@shop-2.service" in out
    assert not place.config.exists() and not place.drop_in.exists()


def test_an_existing_file_keeps_what_it_says_and_a_change_is_told(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.etc.mkdir()
    before = (
        '# our shop\ndb_path = "/old.db" # moved in May\npublish = false\n\n[nats]\nurls = ["nats://x:4222"]  # hub\n'
    )
    place.config.write_text(before)
    place.config.chmod(0o600)
    code, out, _ = run(capsys, "--db", place.database)
    assert code == 0
    after = place.config.read_text()
    assert after == before.replace('"/old.db"', f'"{place.database}"').replace(
        "[nats]\n", '[nats]\nstore_dir = "/var/lib/harmonylite"\n'
    )
    assert f'db_path was "/old.db", is now "{place.database}"' in out
    assert stat.S_IMODE(place.config.stat().st_mode) == 0o600


def test_a_store_in_use_stays_where_it_is(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.folder / "nats").mkdir()
    assert run(capsys, "--db", place.database)[0] == 0
    assert load(place.config).nats.store_dir == ""


def test_a_dry_run_writes_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--db", place.database, "--dry-run")
    assert code == 0
    assert f"would write  {place.config}" in out and f"ReadWritePaths={place.folder}" in out
    assert not place.etc.exists() and not place.units.exists()


def test_a_database_below_home_is_bound_into_an_empty_one(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(place.root / "home" / "pi" / 'my "app" 100%', 0o2770)
    code, _, _ = run(capsys, "--db", folder / "app.db")
    assert code == 0
    lines = place.drop_in.read_text().splitlines()
    quoted = f'"{place.root}/home/pi/my \\"app\\" 100%%"'
    assert lines[lines.index("[Service]") :] == [
        "[Service]",
        "ProtectHome=tmpfs",
        f"BindPaths={quoted}",
        f"ReadWritePaths={quoted}",
        "SupplementaryGroups=ours",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--instance", "config"), "choose another name"),
        (("--instance", "../x"), "use letters"),
        (("--instance", "a.b"), "use letters"),
        (("--group", "no-such-group-here"), "create it with groupadd"),
        (("--group", "root"), "far more than a database"),
        (("--config", "x.toml"), "leave out --config"),
    ],
)
def test_what_it_refuses(
    place: Place, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    code, out, err = run(capsys, "--db", place.database, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert says in err
    assert not place.etc.exists()


def test_wrong_places(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "no such directory" in run(capsys, "--db", place.root / "none" / "app.db")[2]
    assert "is a directory" in run(capsys, "--db", place.folder)[2]
    monkeypatch.setattr(permissions, "TEMPORARY", (tmp_path,))
    assert "temporary directory of its own" in run(capsys, "--db", place.database)[2]
    monkeypatch.setattr(permissions, "account", lambda name: None)
    monkeypatch.setattr(permissions, "TEMPORARY", ())
    assert "no user harmonylite" in run(capsys, "--db", place.database)[2]


def test_mistakes_that_the_file_had_are_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.etc.mkdir()
    place.config.write_text("publsh = true\n")
    code, _, err = run(capsys, "--db", place.database)
    assert code == 1
    assert f"{place.config}:2: publsh is not a key; did you mean publish?" in err


def test_missing_permissions_are_named_with_their_commands(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.folder.chmod(0o755)
    place.database.chmod(0o644)
    code, out, _ = run(capsys, "--db", place.database)
    assert code == 1
    commands = [line.strip() for line in out.splitlines() if line.startswith(" ")]
    assert commands == [f"chmod g+rwxs {place.folder}", f"chmod g+rw {place.database}"]
    # They do mend it.
    place.folder.chmod(0o2775)
    place.database.chmod(0o664)
    assert run(capsys, "--db", place.database)[0] == 0


# -- permissions


@pytest.fixture
def shared(place: Place) -> Account:
    """The daemon with the group that the application shares with it."""
    return replace(DAEMON, gids=DAEMON.gids | {OURS.gid})


def commands(found: list[Missing]) -> list[str]:
    return [command for one in found for command in one.commands]


def test_nothing_is_missing_when_the_group_has_everything(place: Place, shared: Account) -> None:
    assert list(missing(place.database, shared, OURS)) == []


def test_without_the_setgid_bit_the_application_would_be_shut_out(place: Place, shared: Account) -> None:
    place.folder.chmod(0o770)
    [found] = missing(place.database, shared, OURS)
    assert found.commands == (f"chmod g+s {place.folder}",)
    assert "closed to the application" in found.text


def test_companions_that_exist_are_looked_at(place: Place, shared: Account) -> None:
    for suffix in ("-wal", "-shm"):
        make(Path(f"{place.database}{suffix}"), 0o640)
    assert commands(list(missing(place.database, shared, OURS))) == [
        f"chmod g+rw {place.database}-wal",
        f"chmod g+rw {place.database}-shm",
    ]


def test_another_group_than_the_files(place: Place) -> None:
    other = Group("other", 54_322)
    daemon = replace(DAEMON, gids=frozenset({DAEMON.gid, other.gid}))
    found = commands(list(missing(place.database, daemon, other)))
    assert found[:3] == [
        f"chgrp other {place.folder}",
        f"chmod g+rwxs {place.folder}",
        f"chgrp other {place.database}",
    ]
    # Whoever runs this is the application's user, and not in that group; root needs no group.
    assert (len(found) == 4 and found[3].startswith("usermod -aG other ")) == (os.geteuid() != 0)


def test_a_database_that_everybody_may_write_still_closes_its_companions(place: Place, shared: Account) -> None:
    daemon = replace(shared, gids=frozenset({54_321}))  # not in the group: everybody's bits count
    place.folder.chmod(0o2777)
    place.database.chmod(0o606)
    [found] = missing(place.database, daemon, OURS)
    assert found.commands == (f"chmod g+rw {place.database}",)


def test_the_directories_above_must_let_the_daemon_pass(place: Place, shared: Account) -> None:
    above = place.folder.parent
    assert above not in [one.path for one in CLOSED_PARENTS(place.folder, shared)]
    for daemon, letter in ((shared, "g"), (DAEMON, "o")):
        above.chmod(0o761 if letter == "g" else 0o770)  # everybody else may pass, or the group
        found = [one.commands for one in CLOSED_PARENTS(place.folder, daemon) if one.path == above]
        assert found == [(f"chmod {letter}+x {above}",)]


# -- editing


def test_a_commented_key_takes_its_line() -> None:
    text = with_values(example(), {"nats.leaf_servers": '["nats-leaf://hub:7422"]', "node_id": "5"})
    before, after = example().splitlines(), text.splitlines()
    changed = [line for line in after if line not in before]
    assert changed == ["node_id = 5", 'leaf_servers = ["nats-leaf://hub:7422"]']
    assert len(before) == len(after)


def test_a_missing_table_is_appended() -> None:
    assert with_values("publish = true\n", {"nats.domain": '"d"'}) == 'publish = true\n\n[nats]\ndomain = "d"\n'


def test_values_of_several_lines_and_inline_tables_are_refused() -> None:
    with pytest.raises(EditRefused, match=r"line 2 begins a value of several lines: set nats\.urls = "):
        with_values('[nats]\nurls = [\n  "nats://a:1",\n]\n', {"nats.urls": '["nats://b:1"]'})
    with pytest.raises(EditRefused, match=r"set nats\.domain"):
        with_values('nats = {urls = ["nats://a:1"]}\n', {"nats.domain": '"d"'})


_LINES = st.lists(
    st.sampled_from(
        [
            "# a comment",
            "",
            "publish = false # why",
            'db_path = "/a#b"',
            "# db_path = '/c'",
            "node_id = 3",
            '"scan_max_changes" = 7',
            "tables.include = ['*']",
            "note = '''\ndb_path = 1\n[nats]\n'''",
            "[nats]",
            "[snapshot.s3]",
            "[[other]]",
            "# domain = 'x'",
            'domain = "y"',
            'urls = ["nats://a:1", # one\n "nats://b:1"]',
        ]
    ),
    max_size=9,
)


@given(_LINES, st.sampled_from(["db_path", "node_id", "nats.domain", "snapshot.s3.path"]))
def test_an_edit_changes_its_key_alone_or_is_refused(lines: list[str], key: str) -> None:
    text = "\n".join(lines) + "\n"
    try:
        before = toml.loads(text)
    except ValueError:
        return
    try:
        after = toml.loads(with_values(text, {key: '"new"'}))
    except EditRefused:
        return
    assert flat(after) == flat(before) | {key: "new"}


def flat(data: dict[str, object], above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found
