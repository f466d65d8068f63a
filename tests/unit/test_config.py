"""Reading a configuration: every key, every kind of mistake, secrets."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmonylite import config as configuration
from harmonylite.config import Config, ConfigError, Secret, identity, load
from harmonylite.config.model import KEYS, value_of
from harmonylite.config.values import format_size, parse_size
from harmonylite.db.database import ReplicaSettings
from harmonylite.db.replica import Replica

# What a complete file of the Go implementation may hold.
GO_FILE = """
db_path = "app.db"
node_id = 1
seq_map_path = "/tmp/seq-map.cbor"
publish = true
replicate = true
scan_max_changes = 512
cleanup_interval = 5000
sleep_timeout = 15000
polling_interval = 0
[snapshot]
enabled = true
store = "nats"
interval = 0
leader_ttl = 30000
[snapshot.nats]
replicas = 1
bucket = "custom-bucket-name"
[snapshot.s3]
endpoint = "127.0.0.1:9000"
path = "snapshots/harmonylite"
use_ssl = false
access_key = "minio"
secret = "ChangeMe"
session_token = ""
bucket = "harmonylite"
[snapshot.webdav]
url = "https://dav.example.org/?login=me&secret=hidden"
[snapshot.sftp]
url = "sftp://me:hidden@sftp.example.org:22/path"
[replication_log]
replicas = 1
shards = 1
max_entries = 1024
compress = true
update_existing = false
[nats]
urls = [
#    "nats://localhost:4222"
]
bind_address = "0.0.0.0:4222"
server_config = ""
subject_prefix = "harmonylite-change-log"
stream_prefix = "harmonylite-changes"
seed_file = ""
user_name = ""
user_password = ""
ca_file = ""
cert_file = ""
key_file = ""
connect_retries = 5
reconnect_wait_seconds = 2
[prometheus]
enable = false
bind = ":3010"
namespace = ""
subsystem = ""
[logging]
verbose = true
format = "console"
[health_check]
enable = false
bind = "0.0.0.0:8090"
path = "/health"
detailed = true
"""


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def written(folder: Path, text: str) -> Path:
    file = folder / "config.toml"
    file.write_text(text, "utf-8")
    return file


def problems(folder: Path, text: str, overrides: dict[str, object] | None = None) -> dict[str, str]:
    """key -> "line: message" of everything that is wrong."""
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text), overrides)
    return {problem.key: f"{problem.line}: {problem.message}" for problem in caught.value.problems}


def test_a_single_line_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_id = tmp_path / "machine-id"
    machine_id.write_text("0123456789abcdef0123456789abcdef\n")
    monkeypatch.setattr(identity, "MACHINE_ID_FILES", (machine_id,))
    config = load(written(tmp_path, 'db_path = "app.db"'))
    assert config.node_id == identity.node_id_of("0123456789abcdef0123456789abcdef")
    assert config.node_id_from_machine
    assert dataclasses.replace(config, db_path=Path(), node_id=0, file=None, node_id_from_machine=False) == Config()


def test_the_go_file_works_as_it_is(tmp_path: Path) -> None:
    config = load(written(tmp_path, GO_FILE))
    assert (config.node_id, config.sleep_timeout, config.logging.verbose) == (1, 15000, True)
    assert config.snapshot.nats.bucket == "custom-bucket-name"
    assert config.snapshot.s3.secret.reveal() == "ChangeMe"
    assert config.nats.bind_address == "0.0.0.0:4222"
    assert config.prometheus.namespace == ""
    assert not config.external
    assert [(note.key, note.line) for note in config.notes] == [
        ("seq_map_path", 4),
        ("snapshot.webdav", 1 + GO_FILE.split("\n").index("[snapshot.webdav]")),
        ("snapshot.sftp", 1 + GO_FILE.split("\n").index("[snapshot.sftp]")),
    ]
    assert not any("hidden" in str(note) for note in config.notes)


def test_db_path_starts_at_the_working_directory_and_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "elsewhere", 'db_path = "link/app.db"\nnode_id = 1')
    config = load(file)
    assert config.db_path == tmp_path.resolve() / "data" / "app.db"
    assert config.data_dir == tmp_path.resolve() / "data" / "nats"


def test_every_mistake_is_named_at_once_with_key_and_line(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """\
node_id = 0
publish = "yes"
shards = 3
[natz]
urls = []
[nats]
urls = [
  "nats://me:hunter2@hub:99999", # a comment with ] in it
]
node_id = 5
user_pasword = "hunter2"
bind_address = "4222"
domain = "a.b"
[snapshot]
store = "webdav"
retain = true
interval = -1
[replication_log]
replicas = 6
shards = 65
[health_check]
bind = "http://here"
path = "health"
[logging]
format = "xml"
""",
    )
    assert found == {
        "db_path": "None: is not set: it names the application's SQLite file",
        "node_id": f"1: must be from 1 to {2**63 - 1}; it is 0",
        "publish": '2: must be true or false, without quotes; it is "yes"',
        "shards": "3: is not a key; shards belongs in [replication_log]",
        "natz": "4: is not a key; did you mean nats?",
        "nats.urls": "7: has an address with a port outside 1 to 65535: 'nats://********@hub:99999'",
        "nats.node_id": "10: is not a key; node_id belongs at the top of the file, before the first [table]",
        "nats.user_pasword": "11: is not a key; did you mean nats.user_password?",
        "nats.bind_address": '12: must be host:port, for example ":4222"; it is "4222"',
        "nats.domain": '13: must be a name without dots, spaces, *, >, / and \\; it is "a.b"',
        "snapshot.store": '15: must be one of "nats", "s3", "file"; it is "webdav"',
        "snapshot.retain": "16: must be a whole number (1 to 10000); it is true",
        "snapshot.interval": "17: must be from 0 to 4294967295 ms; it is -1",
        "replication_log.replicas": "19: must be from 1 to 5; it is 6",
        "replication_log.shards": "20: must be from 1 to 64; it is 65",
        "health_check.bind": '22: must be host:port, without a scheme or a path; it is "http://here"',
        "health_check.path": '23: must be a path that begins with "/"; it is "health"',
        "logging.format": '25: must be one of "console", "json"; it is "xml"',
    }


def test_the_text_of_the_error_is_one_line_per_mistake(tmp_path: Path) -> None:
    file = written(tmp_path, 'db_path = "a.db"\nnode_id = 1\npublis = true\nreplicate = 1\n')
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).split("\n") == [
        f"{file}:3: publis is not a key; did you mean publish?",
        f"{file}:4: replicate must be true or false, without quotes; it is 1",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"db_path = ", "1: is not valid TOML: Invalid value"),
        (b'db_path = "a"\n[nats\n', "2: is not valid TOML: Expected ']' at the end of a table declaration"),
        (b"a = 1\na = 2\n", "2: is not valid TOML: Cannot overwrite a value"),
        (b"\xff\xfe", "None: is not UTF-8 text (byte 0)"),
    ],
)
def test_what_is_no_toml_is_one_mistake(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    (problem,) = caught.value.problems
    assert problem.file == file
    # The place at the end of the file is told in other words by Python 3.14.
    assert f"{problem.line}: {problem.message}".startswith((message, message.replace("1:", "None:", 1)))


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b'\xef\xbb\xbfdb_path = "a.db"\r\nnode_id = 1\r\n')
    assert load(file).node_id == 1


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: cannot be read: No such file or directory"):
        load(tmp_path / "nothing.toml")


def test_the_default_file_is_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The package's attribute `load` is the function.
    module = sys.modules["harmonylite.config.load"]
    monkeypatch.setattr(module, "SEARCHED", (tmp_path / "etc.toml", Path("config.toml")))
    with pytest.raises(ConfigError, match="name one with --config FILE"):
        configuration.find()
    written(tmp_path, "")
    assert configuration.find() == Path("config.toml")
    (tmp_path / "etc.toml").write_text("")
    assert configuration.find() == tmp_path / "etc.toml"
    assert configuration.find(Path("other.toml")) == Path("other.toml")


def test_overrides_win_over_the_file_and_are_checked(tmp_path: Path) -> None:
    file = written(tmp_path, 'db_path = "a.db"\nnode_id = 1\n[nats]\ncluster_addr = "localhost:1"\n')
    config = load(
        file,
        {
            "node_id": 7,
            "nats.cluster_addr": "localhost:4221",
            "nats.cluster_peers": "nats://localhost:4222/,nats://localhost:4223/",
        },
    )
    assert (config.node_id, config.nats.cluster_addr) == (7, "localhost:4221")
    assert config.nats.cluster_peers == ("nats://localhost:4222/", "nats://localhost:4223/")
    with pytest.raises(ConfigError) as caught:
        load(file, {"node_id": -1})
    assert str(caught.value) == f"node_id must be from 1 to {2**63 - 1}; it is -1 (on the command line)"


def test_without_a_file_everything_comes_from_the_overrides(tmp_path: Path) -> None:
    config = load(None, {"db_path": tmp_path / "a.db", "node_id": 3, "nats.urls": ["nats://hub:4222"]})
    assert (config.db_path, config.node_id, config.external, config.file) == (tmp_path / "a.db", 3, True, None)


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        ("[nats]\nuser_password = 'x'", "nats.user_password", "is set, but nats.user_name is not"),
        ("[nats]\ncert_file = 'x'", "nats.cert_file", "is set, but nats.key_file is not"),
        ("[nats]\nkey_file = 'x'", "nats.key_file", "is set, but nats.cert_file is not"),
        ("[nats]\ncluster_peers = ['nats://b:1']", "nats.cluster_peers", "nats.cluster_addr"),
        ("[snapshot]\nstore = 's3'", "snapshot.s3.bucket", "is not set, but snapshots are to go to S3"),
        ("[snapshot]\nstore = 'file'", "snapshot.file.path", 'is not set, but snapshot.store is "file"'),
        ("[snapshot]\nstore='s3'\nmirror='s3'\n[snapshot.s3]\nbucket='b'", "snapshot.mirror", "is the same"),
        (
            "[prometheus]\nenable = true\nbind = ':9000'\n[health_check]\nenable = true\nbind = '127.0.0.1:9000'",
            "health_check.bind",
            "uses port 9000, which prometheus.bind uses too",
        ),
        ("[nats]\nbind_address = ':4222'\nleaf_listen = ':4222'", "nats.leaf_listen", "uses port 4222"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, lines: str, key: str, message: str) -> None:
    found = problems(tmp_path, f'db_path = "a.db"\nnode_id = 1\n{lines}\n')
    assert list(found) == [key]
    assert message in found[key]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("~nobody-of-that-name/app.db", "begins with the name of a user who has no home here"),
        ("loop/app.db", "is a link that leads to itself"),
    ],
)
def test_a_database_path_that_leads_nowhere_is_one_line(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = given if given.startswith("~") else str(tmp_path / given)
    try:
        found = load(None, {"db_path": path, "node_id": 1}).db_path
    except ConfigError as error:
        assert [problem.key for problem in error.problems] == ["db_path"]
        assert message in error.problems[0].message
    else:  # Python 3.13 and later resolve a loop as far as it goes; opening the file says the rest
        assert given == "loop/app.db" and found.name == "app.db"


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        ("[nats]\nurls = ['nats://h']\nserver_config = 'x'", "nats.server_config", "no bundled server runs"),
        ("[replication_log]\nreplicas = 3", "replication_log.replicas", "cannot be met"),
        (
            "[snapshot]\nstore = 's3'\n[snapshot.s3]\nbucket = 'b'\nendpoint = 'minio:9000'",
            "snapshot.s3.use_ssl",
            "unencrypted",
        ),
        ("[nats]\nseed_file = '${CREDENTIALS_DIRECTORY}/seed'", "nats.seed_file", "without systemd credentials"),
        ("[nats]\nseed_file = '/no/such.seed'", "nats.seed_file", "names /no/such.seed, and there is no such file"),
        ("[nats]\nca_file = '/no/such.pem'", "nats.ca_file", "names /no/such.pem, and there is no such file"),
        ("[nats]\nserver_config = '/no/such'", "nats.server_config", "names /no/such, and there is no such file"),
        ("[nats]\nserver_binary = '/no/such'", "nats.server_binary", "names /no/such, and there is no such file"),
        ("[nats]\nseed_file = '/'", "nats.seed_file", "names /, which is a directory and not a file"),
        ("[nats]\nuser_name = 'u'", "nats.user_name", "no password is, and `run` refuses that: set nats."),
        (
            "[snapshot]\nstore = 's3'\n[snapshot.s3]\nbucket = 'b'\naccess_key = 'k'",
            "snapshot.s3.access_key",
            "snapshot.s3.secret is not: set snapshot.s3.secret or snapshot.s3.secret_file, unless systemd hands s3_sec",
        ),
        (
            "[snapshot]\nmirror = 's3'\n[snapshot.s3]\nbucket = 'b'\nsecret = 'hidden'",
            "snapshot.s3.secret",
            "snapshot.s3.access_key is not",
        ),
        ("[snapshot.file]\npath = '/x'", "snapshot.file.path", 'has no effect: snapshot.store is "nats", not "file"'),
        ("[snapshot]\nenabled = false\nmirror = 's3'", "snapshot.mirror", "has no effect: snapshot.enabled is false"),
        ("[snapshot]\ninterval = 60", "snapshot.interval", "is 60 milliseconds: for seconds write 60000"),
        ("sleep_timeout = 30", "sleep_timeout", "is 30 milliseconds: for seconds write 30000"),
        ("[snapshot.nats]\nreplicas = 3", "snapshot.nats.replicas", "cannot be met: 3 copies need a cluster"),
        ("publish = false\nreplicate = false", "publish", "this node neither sends nor receives changes"),
        ("[tables]\nexclude = ['*']", "tables.exclude", "nothing is replicated"),
        ("[tables]\ninclude = ['a', 'b']\nexclude = ['b']", "tables.include", 'holds "b", which tables.exclude takes'),
    ],
)
def test_settings_without_effect_are_noted(tmp_path: Path, lines: str, key: str, message: str) -> None:
    config = load(written(tmp_path, f'db_path = "a.db"\nnode_id = 1\n{lines}\n'))
    assert [note.key for note in config.notes] == [key]
    assert message in config.notes[0].message


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        ("[nats]\nurls = ['nats://a,nats://b']", "nats.urls", "write them as a list, each in its own quotes"),
        ("[nats]\nurls = ['nats://<host>:4222']", "nats.urls", "is not scheme://host:port"),
        ("[nats]\nurls = ['nats://10.0.0.256']", "nats.urls", "whose host is not an IPv4 address"),
        ("[nats]\nbind_address = '10.0.0.256:4222'", "nats.bind_address", "10.0.0.256 is not an IPv4 address"),
        ("[nats]\nsubject_prefix = '$JS.API'", "nats.subject_prefix", "must be a NATS subject"),
        ("[snapshot.s3]\nbucket = 'my bucket'", "snapshot.s3.bucket", "must be text without spaces"),
        ("[snapshot.s3]\nendpoint = '<host>:9000'", "snapshot.s3.endpoint", "must be text without spaces"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path: Path, lines: str, key: str, message: str) -> None:
    found = problems(tmp_path, f'db_path = "a.db"\nnode_id = 1\n{lines}\n')
    assert list(found) == [key]
    assert message in found[key]


def test_folders_that_are_missing_here_are_told_by_line(tmp_path: Path) -> None:
    shelf = tmp_path / "no" / "shelf"
    text = (
        f'node_id = 1\ndb_path = "{tmp_path}/gone/a.db"\n[snapshot]\nstore = "file"\n[snapshot.file]\npath = "{shelf}"'
    )
    config = load(written(tmp_path, text))
    assert config.notes == ()  # that is for `check-config`: elsewhere it would be noise
    database, store = configuration.remarks_here(config)
    assert (database.key, database.line) == ("db_path", 2)
    assert database.message.startswith(f"its directory {tmp_path}/gone does not exist on this machine: create it")
    assert (store.key, store.line) == ("snapshot.file.path", 6)
    assert f"{tmp_path}/no does not exist" in store.message
    (tmp_path / "gone").mkdir()
    (tmp_path / "no").mkdir()  # the store makes its own folder in it
    assert configuration.remarks_here(config) == ()
    shelf.touch()
    assert [note.message for note in configuration.remarks_here(config)] == [
        f"its directory {shelf} is a file: correct snapshot.file.path"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_this_user_may_not_write(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    [note] = configuration.remarks_here(load(None, {"node_id": 1, "db_path": str(closed / "a.db")}))
    assert note.key == "db_path"
    assert f"{closed} may not be written by the user who asks" in note.message


@pytest.mark.parametrize(
    "address", [":3010", "0.0.0.0:8090", "[::1]:80", "localhost:65535", "::1:80", "a b:1", ":0", "x:"]
)
def test_listen_addresses(tmp_path: Path, address: str) -> None:
    text = f'db_path = "a.db"\nnode_id = 1\n[health_check]\nbind = "{address}"\n'
    if address in (":3010", "0.0.0.0:8090", "[::1]:80", "localhost:65535"):
        assert load(written(tmp_path, text)).health_check.bind == address
    else:
        assert list(problems(tmp_path, text)) == ["health_check.bind"]


def test_split_address() -> None:
    assert configuration.split_address(":3010") == ("", 3010)
    assert configuration.split_address("[::1]:80") == ("::1", 80)
    assert configuration.split_address("127.0.0.1:-1", any_port=True) == ("127.0.0.1", 0)
    assert configuration.split_address(":0", any_port=True) == ("", 0)


@pytest.mark.parametrize(
    ("given", "wanted"), [("2GB", 2 << 30), ("512 mb", 512 << 20), ("64KiB", None), (1 << 20, 1 << 20), (0, 0)]
)
def test_max_store_is_bytes_or_a_size(tmp_path: Path, given: object, wanted: int | None) -> None:
    overrides = {"db_path": tmp_path / "a.db", "node_id": 1, "nats.max_store": given}
    if wanted is None:  # below a megabyte
        with pytest.raises(ConfigError, match=r"nats\.max_store must be 1MB to 1024TB"):
            load(None, overrides)
    else:
        assert load(None, overrides).nats.max_store == wanted


@given(st.integers(0, 2**50))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


SECRETS = {key.name: key for key in KEYS.values() if key.rule.secret}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_come_from_a_file_or_from_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base: dict[str, object] = {"db_path": tmp_path / "a.db", "node_id": 1, "nats.user_name": "me"}
    (tmp_path / "secret").write_text("from file\n")
    from_file = load(None, {**base, f"{name}_file": str(tmp_path / "secret")})
    assert value_of(from_file, name).reveal() == "from file"

    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / SECRETS[name].credential).write_text("from systemd")
    assert value_of(load(None, base), name).reveal() == "from systemd"
    expanded = load(None, {**base, f"{name}_file": "${CREDENTIALS_DIRECTORY}/secret"})
    assert value_of(expanded, name).reveal() == "from file"
    # What is nearer wins.
    assert value_of(load(None, {**base, name: "in the file"}), name).reveal() == "in the file"

    with pytest.raises(ConfigError, match="are both set"):
        load(None, {**base, name: "in the file", f"{name}_file": str(tmp_path / "secret")})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(None, {**base, f"{name}_file": str(tmp_path / "missing")})
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ConfigError, match="which is empty"):
        load(None, {**base, f"{name}_file": str(tmp_path / "secret")})


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    config = load(
        None,
        {
            "db_path": tmp_path / "a.db",
            "node_id": 1,
            "nats.urls": ["nats://me:hunter2@hub:4222", "nats://me:hunt/hunter2@hub:4222"][:1],
            "nats.user_name": "me",
            "nats.user_password": "hunter2",
            "snapshot.s3.secret": "hunter2",
        },
    )
    assert config.nats.user_password.reveal() == "hunter2"
    assert config.nats.urls[0] == "nats://me:hunter2@hub:4222"
    shown = [repr(config), str(config), configuration.describe(config), str(configuration.describe_data(config))]
    assert all("hunter2" not in text for text in shown)
    assert all("********" in text for text in shown)
    assert f"{config.nats.user_password}" == "********"
    assert str(Secret()) == ""
    assert configuration.mask_url("me:hunt@er/2@hub") == "********@hub"


def test_what_is_in_force_reads_back_the_same(tmp_path: Path) -> None:
    config = load(written(tmp_path, GO_FILE.replace("ChangeMe", "")))
    text = configuration.describe(config).replace("********", "minio")
    again = load(written(tmp_path, text))
    assert dataclasses.replace(again, notes=(), file=None) == dataclasses.replace(config, notes=(), file=None)


def test_the_node_id_from_the_machine_is_stable_and_valid() -> None:
    # Fixed for ever: another number would make a node a stranger to its own cluster.
    assert identity.node_id_of("0" * 32) == 8638110371458412805
    assert identity.node_id_of("0" * 31 + "1") != identity.node_id_of("0" * 32)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/etc of a machine: its id, and a folder for configurations."""
    (tmp_path / "machine-id").write_text("0123456789abcdef" * 2)
    monkeypatch.setattr(identity, "MACHINE_ID_FILES", (tmp_path / "machine-id",))
    monkeypatch.setattr(identity, "CONFIG_DIRECTORY", tmp_path / "etc")
    (tmp_path / "etc").mkdir()
    return tmp_path


def _configured(machine: Path, name: str, database: Path) -> Config:
    file = machine / "etc" / name
    file.write_text(f'db_path = "{database}"\n')
    return load(file)


def test_instances_written_by_hand_have_ids_of_their_own(machine: Path) -> None:
    own = identity.node_id_of("0123456789abcdef" * 2)
    assert _configured(machine, "config.toml", machine / "a.db").node_id == own
    shop, till = (_configured(machine, f"{name}.toml", machine / "a.db") for name in ("shop", "till"))
    assert len({own, shop.node_id, till.node_id}) == 3
    assert shop.node_id_from_machine
    assert _configured(machine, "shop.toml", machine / "moved.db").node_id == shop.node_id
    # Elsewhere a file's name means nothing.
    assert load(written(machine, 'db_path = "x.db"')).node_id == own
    assert not (machine / "a.db").exists(), "looking makes no file"


def test_a_database_that_has_the_machines_id_keeps_it(machine: Path) -> None:
    own, database = identity.node_id_of("0123456789abcdef" * 2), machine / "app.db"
    with contextlib.closing(sqlite3.connect(database)) as application:
        application.execute("PRAGMA journal_mode = WAL")
        application.execute("CREATE TABLE t (k INTEGER PRIMARY KEY)")
    fresh = _configured(machine, "shop.toml", database).node_id
    for known, expected in ((own, own), (fresh, fresh), (4711, fresh)):
        replica = Replica(database, ReplicaSettings(node_id=known))
        replica.open()
        # Also while it is in use, as at a reload.
        assert _configured(machine, "shop.toml", database).node_id == expected
        replica.close()
        assert _configured(machine, "shop.toml", database).node_id == expected
    # On a cloned card with a machine id of its own, what the database says is another machine's.
    replica = Replica(database, ReplicaSettings(node_id=own))
    replica.open()
    replica.close()
    (machine / "machine-id").write_text("f" * 32)
    assert _configured(machine, "shop.toml", database).node_id == identity.node_id_of("f" * 32 + "/shop")


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"x" * 4080])
def test_a_database_that_cannot_be_read_does_not_keep_from_choosing(machine: Path, content: bytes) -> None:
    (machine / "app.db").write_bytes(content)
    chosen = _configured(machine, "shop.toml", machine / "app.db").node_id
    assert chosen == identity.node_id_of("0123456789abcdef" * 2 + "/shop")
    assert (machine / "app.db").read_bytes() == content
    assert identity.choose("0123456789abcdef" * 2, "shop", machine / ("x" * 300)) == chosen


@given(st.text("0123456789abcdef", min_size=32, max_size=32))
def test_every_machine_gives_a_valid_node_id(machine_id: str) -> None:
    assert 1 <= identity.node_id_of(machine_id) <= 2**63 - 1


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", "x" * 32])
def test_a_machine_without_an_id_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    file = tmp_path / "machine-id"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(identity, "MACHINE_ID_FILES", (file,))
    assert "set node_id" in problems(tmp_path, 'db_path = "a.db"')["node_id"]


_scalars: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.sampled_from(["hunter2:x", "nats://a:hunter2@b:1", "nats://a:hunter2/@b:x", "://hunter2@", "2GB", "-1", "[::"]),
)
_values = st.one_of(
    _scalars, st.lists(_scalars, max_size=3), st.dictionaries(st.text(max_size=5), _scalars, max_size=2)
)


SERVER_LISTS = ("nats.urls", "nats.leaf_servers", "nats.cluster_peers")


def only_as_password(value: object) -> bool:
    """Does "hunter2" stand before an @ wherever it stands?"""
    items = value if isinstance(value, list) else [value]
    found = [item for item in items if isinstance(item, str) and "hunter2" in item]
    return all("@" in item.rpartition("hunter2")[2] for item in found)


@given(st.sampled_from(sorted(KEYS)), _values)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(tmp_path: Path, name: str, value: object) -> None:
    overrides = {"db_path": tmp_path / "a.db", "node_id": 1, "nats.user_name": "me", name: value}
    try:
        config = load(None, overrides)
    except ConfigError as error:
        for problem in error.problems:
            assert "\n" not in str(problem)
            assert problem.key
            if KEYS[name].rule.secret or (name in SERVER_LISTS and only_as_password(value)):
                assert "hunter2" not in str(problem)
    else:
        text = configuration.describe(config)
        if KEYS[name].rule.secret:
            assert "hunter2" not in text


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_makes_it_crash(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        load(file)


def test_permissions_are_told(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    file = written(tmp_path, "")
    file.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load(file)
