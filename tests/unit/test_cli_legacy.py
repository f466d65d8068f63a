"""The Go implementation's command lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonylite.cli.legacy import modern

CLUSTER = "nats://localhost:4222/,nats://localhost:4223/"


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ("-config a.toml", "run --config=a.toml"),
        ("--config a.toml", "run --config=a.toml"),
        ("-config=a.toml", "run --config=a.toml"),
        (
            f"-config a.toml -cluster-addr localhost:4221 -cluster-peers {CLUSTER}",
            f"run --config=a.toml --cluster-addr=localhost:4221 --cluster-peers={CLUSTER}",
        ),
        ("-node-id 5 -leaf-servers nats://h:1 -pprof :6060", "run --node-id=5 --leaf-servers=nats://h:1 --pprof=:6060"),
        ("-config a.toml -cleanup", "cleanup --config=a.toml"),
        ("-cleanup=true -config a.toml", "cleanup --config=a.toml"),
        ("-config a.toml -cleanup=false", "run --config=a.toml"),
        ("-save-snapshot -config a.toml", "snapshot save --config=a.toml"),
        ("-schema-status -config a.toml", "schema status --config=a.toml"),
        ("-schema-status-cluster", "schema status --cluster"),
        ("-version", "version"),
        ("--version", "version"),
        # A flag of ours after a command is left to it.
        ("status --config a.toml --json", "status --config=a.toml --json"),
        ("-config a.toml status", "--config=a.toml status"),
        ("conflicts --table -version", "conflicts --table -version"),
        ("-help", "--help"),
        ("-h", "--help"),
        ("status -h", "status --help"),
        ("-config", "run --config"),
        ("", ""),
    ],
)
def test_command_lines(given_: str, wanted: str) -> None:
    assert modern(given_.split()) == wanted.split()


@given(
    st.lists(
        st.sampled_from(["-config", "--node-id=4", "-cleanup", "status", "--json", "-h", "x", "-", "--", "", "-x=y"])
    )
)
def test_what_is_modern_stays_as_it_is(arguments: list[str]) -> None:
    once = modern(arguments)
    assert modern(once) == once
