"""The generated configuration: each shape is what nats-server itself accepts, and says what was asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonylite.stream import nats_conf
from harmonylite.stream.server_config import ServerPlan, ServerSettings, SettingsError, plan_server, store_limit
from tests.stream.support import (
    OLD_SERVER,
    make_certificates,
    make_nkey,
    nats_server_binary,
    needs_old_server,
)

NEW = (2, 12, 0)
PEERS = ("nats://127.0.0.1:14222/", "nats://127.0.0.1:14223/")


def plan(folder: Path, version: tuple[int, int, int] = NEW, **changes: object) -> ServerPlan:
    node = ServerSettings(node_id=7, data_dir=folder, **changes)  # type: ignore[arg-type]
    return plan_server(node, version, max_store=1 << 30)


def accepted(made: ServerPlan, folder: Path, binary: str | None = None) -> nats_conf.Block:
    """What our reader finds in the configuration, after nats-server itself found no fault with it."""
    folder.mkdir(exist_ok=True)
    file = folder / "try.conf"
    file.write_text(made.text)
    done = subprocess.run(
        [binary or nats_server_binary(), "-t", "-c", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return nats_conf.read_file(file)


def block(found: nats_conf.Block, name: str) -> nats_conf.Block:
    inner = found[name]
    assert isinstance(inner, dict)
    return inner


def test_alone(tmp_path: Path) -> None:
    made = plan(tmp_path / "data")
    assert (made.shape, made.jetstream, made.domain, made.replicas_possible) == ("alone", True, None, 1)
    found = accepted(made, tmp_path)
    assert found["listen"] == "127.0.0.1:-1"
    assert found["server_name"] == "harmonylite-node-7"
    assert found["store_dir"] == str(tmp_path / "data/harmonylite-node-7")
    assert block(found, "jetstream") == {"max_file_store": str(1 << 30), "sync_interval": "10s"}
    assert "cluster" not in found and "leafnodes" not in found and "authorization" not in found


def test_hub_has_a_domain_and_syncs_always(tmp_path: Path) -> None:
    made = plan(tmp_path, leaf_listen="0.0.0.0:17422", bind_address=":14222")
    assert (made.shape, made.domain) == ("hub", None)
    found = accepted(made, tmp_path)
    assert found["listen"] == "0.0.0.0:14222"
    assert block(found, "jetstream")["domain"] == "hub"
    assert block(found, "jetstream")["sync_interval"] == "always"
    assert block(found, "leafnodes")["listen"] == "0.0.0.0:17422"
    # Not no_advertise, which shuts out leaves of 2.9 (Debian 12's, on armhf): see test_server.py.
    assert block(found, "leafnodes")["advertise"] == "127.0.0.1:1"
    assert block(accepted(plan(tmp_path, leaf_listen=":1", domain="shop"), tmp_path), "jetstream")["domain"] == "shop"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"leaf_listen": "0.0.0.0:17422"}, True),
        ({"leaf_listen": ":17422"}, True),
        ({"bind_address": "[::]:14222"}, True),
        ({"leaf_listen": "127.0.0.1:17422", "bind_address": "localhost:14222"}, False),
        ({"leaf_listen": "0.0.0.0:17422", "user_name": "u", "user_password": "p"}, False),
        ({"leaf_servers": ("hub:7422",)}, False),
    ],
)
def test_a_server_that_is_open_to_everybody_is_told(tmp_path: Path, settings: dict[str, Any], told: bool) -> None:
    warnings = plan(tmp_path, **settings).warnings
    assert any("open to everybody" in each for each in warnings) == told


def test_leaf_stores_nothing(tmp_path: Path) -> None:
    made = plan(tmp_path, leaf_servers=("nats-leaf://hub:7422", "hub2:7422"), user_name="a b", user_password="p/@:")
    assert (made.shape, made.jetstream, made.domain, made.replicas_possible) == ("leaf", False, "hub", None)
    found = accepted(made, tmp_path)
    assert "jetstream" not in found and "store_dir" not in found
    remotes = block(found, "leafnodes")["remotes"]
    urls = ["nats://a%20b:p%2F%40%3A@hub:7422", "nats://a%20b:p%2F%40%3A@hub2:7422"]
    assert remotes == [{"urls": urls}]
    newer = accepted(plan(tmp_path, (2, 14, 0), leaf_servers=("hub:7422",)), tmp_path)
    remotes = block(newer, "leafnodes")["remotes"]
    assert remotes == [{"urls": ["nats://hub:7422"], "ignore_discovered_servers": "true"}]
    assert plan(tmp_path, leaf_servers=("hub",), domain="shop").domain == "shop"


def test_cluster(tmp_path: Path) -> None:
    own = "nats://127.0.0.1:14221"
    made = plan(tmp_path, cluster_addr="127.0.0.1:14221", cluster_peers=(own, *PEERS), user_name="u", user_password="p")
    assert (made.shape, made.domain, made.replicas_possible, made.warnings) == ("cluster", None, 3, ())
    found = accepted(made, tmp_path)
    assert block(found, "cluster")["listen"] == "127.0.0.1:14221"
    assert block(found, "cluster")["routes"] == ["nats://u:p@127.0.0.1:14222", "nats://u:p@127.0.0.1:14223"]
    assert block(found, "jetstream")["sync_interval"] == "always"
    with_copies = plan(tmp_path, cluster_addr="127.0.0.1:14221", cluster_peers=PEERS, replicas=3)
    assert block(accepted(with_copies, tmp_path), "jetstream")["sync_interval"] == "10s"


def test_two_nodes_and_a_lonely_cluster_address_are_warned_about(tmp_path: Path) -> None:
    two = plan(tmp_path, cluster_addr="127.0.0.1:14221", cluster_peers=PEERS[:1])
    assert "cluster of two" in two.warnings[0]
    lonely = plan(tmp_path, cluster_addr="127.0.0.1:14221")
    assert lonely.shape == "alone" and "cluster_peers" in lonely.warnings[0]
    assert "cluster" not in accepted(lonely, tmp_path)  # with JetStream and no routes the server would not start


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"leaf_servers": ("h",), "cluster_addr": ":1", "cluster_peers": PEERS}, "exclude each other"),
        # nats-server would let in whoever knows the name.
        ({"user_name": "u", "leaf_listen": ":1"}, "user_name is set and no password is"),
        ({"cluster_peers": PEERS}, "cluster_addr"),
        ({"cert_file": "a"}, "belong together"),
        ({"user_name": "u", "user_password": "$2a$11$abcdefghijklmnopqrstuv"}, "bcrypt"),
        ({"server_config": "/nowhere/at/all.conf"}, "server_config /nowhere/at/all.conf"),
        ({"seed_file": "/nowhere/seed"}, "seed_file /nowhere/seed"),
    ],
)
def test_contradictions_are_one_line(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan(tmp_path, **changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_seed_is_refused_without_showing_it(tmp_path: Path) -> None:
    file = tmp_path / "seed"
    file.write_text("SUANOTASEED\n")
    with pytest.raises(SettingsError) as caught:
        plan(tmp_path, seed_file=str(file))
    assert "damaged" in str(caught.value) and "NOTASEED" not in str(caught.value)


def test_secrets_stay_out_of_repr(tmp_path: Path) -> None:
    node = ServerSettings(node_id=1, data_dir=tmp_path, user_name="u", user_password="topsecret")
    assert "topsecret" not in repr(node)
    assert "topsecret" not in repr(plan_server(node, NEW, max_store=1))


def test_tls_everywhere_with_client_certificates(tmp_path: Path) -> None:
    certs = make_certificates(tmp_path / 'it\'s a "folder"')
    files = {"ca_file": str(certs.ca), "cert_file": str(certs.server_cert), "key_file": str(certs.server_key)}
    expected = {**files, "verify": "true"}
    hub = accepted(
        plan(tmp_path, leaf_listen="127.0.0.1:-1", cluster_addr="127.0.0.1:1", cluster_peers=PEERS, **files), tmp_path
    )
    assert hub["tls"] == expected
    assert block(hub, "leafnodes")["tls"] == expected
    assert block(hub, "cluster")["tls"] == expected
    leaf = accepted(plan(tmp_path, leaf_servers=("tls://hub",), **files), tmp_path)
    assert block(leaf, "leafnodes")["remotes"] == [{"urls": ["tls://hub"], "tls": files}]


def test_nkey(tmp_path: Path) -> None:
    key = make_nkey(tmp_path)
    hub = accepted(plan(tmp_path, leaf_listen="127.0.0.1:-1", seed_file=str(key.seed_file)), tmp_path)
    assert block(hub, "authorization")["users"] == [{"nkey": key.public_key}]
    leaf = accepted(plan(tmp_path, leaf_servers=("hub",), seed_file=str(key.seed_file)), tmp_path)
    assert block(leaf, "leafnodes")["remotes"] == [{"urls": ["nats://hub"], "nkey": key.seed_file.read_text().strip()}]
    with pytest.raises(SettingsError, match=r"2\.10"):
        plan(tmp_path, (2, 9, 10), leaf_servers=("hub",), seed_file=str(key.seed_file))


def test_the_operators_file_wins_and_ours_fills_in(tmp_path: Path) -> None:
    theirs = tmp_path / "it's their file.conf"
    (tmp_path / "users.conf").write_text("authorization { users: [ {user: a, password: b} ] }\n")
    theirs.write_text("port: -1\nhost: 127.0.0.1 # theirs\njetstream {\n domain: shop\n}\ninclude ./users.conf\n")
    made = plan(tmp_path / "data", server_config=str(theirs), leaf_listen="127.0.0.1:-1", user_name="us")
    (tmp_path / "data").mkdir()
    found = accepted(made, tmp_path / "data")
    assert found["port"] == "-1" and "listen" not in found
    assert found["jetstream"] == {"domain": "shop"}
    # Without this line, their block, which names no folder, would put the streams into a temporary one.
    assert found["store_dir"] == str(tmp_path / "data/harmonylite-node-7")
    assert found["authorization"] == {"users": [{"user": "a", "password": "b"}]}
    assert block(found, "leafnodes")["listen"] == "127.0.0.1:-1"
    assert found["server_name"] == "harmonylite-node-7"


def test_the_operators_store_is_used(tmp_path: Path) -> None:
    theirs = tmp_path / "own.conf"
    theirs.write_text(f'JetStream: {{ store_dir: "{tmp_path}/elsewhere" }}')
    found = accepted(plan(tmp_path, server_config=str(theirs)), tmp_path)
    assert "store_dir" not in found


@pytest.mark.parametrize(
    ("text", "shape", "jetstream", "domain"),
    [
        ("leafnodes { remotes = [ {url: nats://h:7422} ] }", "leaf", False, "hub"),
        ("leafnodes { remotes = [ {url: nats://h:7422} ] }\njetstream: enabled", "hub", True, None),
        ("cluster { name: x\n listen: 127.0.0.1:-1\n routes: [nats://127.0.0.1:1] }", "cluster", True, None),
    ],
)
def test_the_operators_file_decides_the_shape(
    tmp_path: Path, text: str, shape: str, jetstream: bool, domain: str | None
) -> None:
    theirs = tmp_path / "own.conf"
    theirs.write_text(text)
    made = plan(tmp_path, server_config=str(theirs))
    assert (made.shape, made.jetstream, made.domain) == (shape, jetstream, domain)
    accepted(made, tmp_path)


def test_versions(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"2\.8\.4 is too old"):
        plan(tmp_path, (2, 8, 4))
    old = plan(tmp_path, (2, 9, 10), leaf_listen="127.0.0.1:-1")
    assert "2.9.10 cannot sync" in old.warnings[0]
    assert "sync_interval" not in old.text and "compression" not in old.text


@needs_old_server
def test_the_oldest_server_accepts_every_shape(tmp_path: Path) -> None:
    old = (2, 9, 10)
    for changes in (
        {},
        {"leaf_listen": "127.0.0.1:-1", "user_name": 'a"b', "user_password": "$x \\ '"},
        {"leaf_servers": ("nats://h:1",), "user_name": "u", "user_password": "p"},
        {"cluster_addr": "127.0.0.1:1", "cluster_peers": PEERS},
    ):
        accepted(plan(tmp_path, old, **changes), tmp_path, OLD_SERVER)


def test_the_store_stays_below_the_free_space(tmp_path: Path) -> None:
    free = store_limit(tmp_path / "not/there/yet")
    assert free >= 1 << 20
    assert store_limit(tmp_path, 5 << 20) == 5 << 20
    assert store_limit(tmp_path, 1 << 60) <= free * 1.01 + (64 << 20)
    assert store_limit(tmp_path, 1) == 1 << 20


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_quoting_survives_reading(text: str) -> None:
    reader = nats_conf._Reader(f"a {nats_conf.quote(text)}\nb: 1", Path(), [0])
    assert reader.block() == {"a": text, "b": "1"}


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=20))
def test_quoting_survives_the_server(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """The server itself must see the end of the string where we do."""
    file = tmp_path_factory.mktemp("quote") / "q.conf"
    file.write_text(f"listen: {nats_conf.quote('127.0.0.1:-1')}\nserver_name: {nats_conf.quote('x' + text)}\nnope: 1\n")
    done = subprocess.run([nats_server_binary(), "-t", "-c", str(file)], capture_output=True, text=True, check=False)
    # Everything up to the setting that does not exist was understood, and nothing leaked out of the string.
    assert f'{file}:3:1: unknown field "nope"' in done.stderr
    assert done.stderr.count("unknown field") == 1


@given(st.text(alphabet="ab:={}[]()\"'\\ \n#/,;$x0", max_size=60))
def test_the_reader_never_hangs_or_fails(text: str) -> None:
    nats_conf._Reader(text.replace("include", ""), Path(), [0]).block()


def test_reading() -> None:
    text = """
    # comment { with: braces }
    port = 4222 // more
    NAME: 'it"s'
    map { a: 1, b { c = "x\\x41\\n" } }
    list: [ {user: u}, "two", 3 ]
    raw (
      anything ) goes {
    )
    url nats://h:1; last: yes
    """
    assert nats_conf._Reader(text, Path(), [0]).block() == {
        "port": "4222",
        "name": 'it"s',
        "map": {"a": "1", "b": {"c": "xA\n"}},
        "list": [{"user": "u"}, "two", "3"],
        "raw": "\n      anything ) goes {\n",
        "url": "nats://h:1",
        "last": "yes",
    }
