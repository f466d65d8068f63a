"""`doctor` logs in to real servers as the daemon would, and asks for what the daemon needs."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonylite.cli import nats_check
from harmonylite.cli.checks import Check
from harmonylite.config import load
from tests.stream.support import bare_server, free_port

USERS = "authorization { users: [ { user: me, password: hunter2 } ] }"


def found(tmp_path: Path, **nats: Any) -> Check:
    keys = {f"nats.{name}": value for name, value in nats.items()}
    config = load(None, {"db_path": tmp_path / "app.db", "node_id": 7, **keys})
    [check] = [check for check in nats_check.checks(config, running=False) if check.name in ("nats", "hub")]
    assert "hunter2" not in check.text + check.advice
    return check


@contextlib.contextmanager
def listener(first_words: bytes) -> Iterator[str]:
    """Something that listens, and says that to whoever comes."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    visitor, _ = door.accept()
                    visitor.sendall(first_words)
                    visitor.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"nats://127.0.0.1:{door.getsockname()[1]}"
        door.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_server_that_takes_us_and_has_jetstream(tmp_path: Path) -> None:
    with bare_server(tmp_path, USERS) as (url, _):
        right = found(tmp_path, urls=["nats://127.0.0.1:1", url], user_name="me", user_password="hunter2")
        assert right.level == "ok"
        assert "JetStream answers, stream harmonylite-changes-1 is made by the first node" in right.text
        in_url = found(tmp_path, urls=[url.replace("//", "//me:hunter2@")])
        assert in_url.level == "ok"


def test_a_login_that_is_refused_is_no_being_offline(tmp_path: Path) -> None:
    with bare_server(tmp_path, USERS) as (url, _):
        wrong = found(tmp_path, urls=[url], user_name="me", user_password="wrong")
        assert wrong.level == "fail"
        assert "refuses the login: check [nats] user_name, user_password, seed_file" in wrong.text
        none = found(tmp_path, urls=[url])
        assert (none.level, "it wants a login, none is set" in none.text) == ("fail", True)


def test_a_server_without_jetstream_is_of_no_use(tmp_path: Path) -> None:
    with bare_server(tmp_path, "accounts { A: { users: [ { user: me, password: hunter2 } ] } }") as (url, _):
        check = found(tmp_path, urls=[url], user_name="me", user_password="hunter2")
    assert check.level == "fail"
    assert "but JetStream cannot be used" in check.text


def test_nobody_there_is_an_ordinary_state(tmp_path: Path) -> None:
    check = found(tmp_path, urls=[f"nats://127.0.0.1:{free_port()}"])
    assert check.level == "warn"
    assert "Connection refused" in check.text and "works offline" in check.advice


@pytest.mark.parametrize("key", ["urls", "leaf_servers"])
def test_another_program_on_that_port(tmp_path: Path, key: str) -> None:
    with listener(b"220 mail.example.org ESMTP\r\n") as url:
        check = found(tmp_path, **{key: [url]})
    assert check.level == "fail"
    assert "what listens there is no NATS server" in check.text


def test_a_hub_answers_on_its_leaf_port(tmp_path: Path) -> None:
    port = free_port()
    with bare_server(tmp_path, f'leafnodes {{ listen: "127.0.0.1:{port}" }}'):
        check = found(tmp_path, leaf_servers=[f"nats-leaf://127.0.0.1:{port}"])
    assert (check.name, check.level) == ("hub", "ok")
