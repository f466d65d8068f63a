"""What the configuration file says reaches the server and the client."""

from __future__ import annotations

from pathlib import Path

from harmonylite.config.model import Config, Nats, ReplicationLog
from harmonylite.config.values import Secret
from harmonylite.stream.client import ClientSettings
from harmonylite.stream.server_config import ServerSettings


def config(**nats: object) -> Config:
    return Config(
        db_path=Path("/data/app.db"),
        node_id=5,
        replication_log=ReplicationLog(replicas=3),
        nats=Nats(**nats),  # type: ignore[arg-type]
    )


CREDENTIALS = {
    "user_name": "u",
    "user_password": Secret("p"),
    "seed_file": "/s",
    "ca_file": "/ca",
    "cert_file": "/c",
    "key_file": "/k",
}


def test_server_settings() -> None:
    made = ServerSettings.from_config(
        config(
            bind_address="0.0.0.0:4222",
            cluster_addr="0.0.0.0:4248",
            cluster_peers=("nats://b:4248", "nats://c:4248"),
            leaf_listen="0.0.0.0:7422",
            domain="shop",
            max_store=7 << 20,
            sync_interval="1m",
            server_binary="/opt/nats-server",
            server_config="/etc/own.conf",
            **CREDENTIALS,
        )
    )
    assert made == ServerSettings(
        node_id=5,
        data_dir=Path("/data/nats"),
        bind_address="0.0.0.0:4222",
        cluster_addr="0.0.0.0:4248",
        cluster_peers=("nats://b:4248", "nats://c:4248"),
        leaf_listen="0.0.0.0:7422",
        domain="shop",
        max_store=7 << 20,
        sync_interval="1m",
        replicas=3,
        server_binary="/opt/nats-server",
        server_config="/etc/own.conf",
        user_name="u",
        user_password="p",
        seed_file="/s",
        ca_file="/ca",
        cert_file="/c",
        key_file="/k",
    )
    # Where the Go implementation kept its streams.
    assert made.store_dir == Path("/data/nats/harmonylite-node-5")
    assert ServerSettings.from_config(config(leaf_servers=("h:7422",))).leaf_servers == ("h:7422",)


def test_client_settings() -> None:
    made = ClientSettings.from_config(config(urls=("nats://h",), reconnect_wait_seconds=3.0, **CREDENTIALS))
    assert made == ClientSettings(
        node_id=5,
        urls=("nats://h",),
        user_name="u",
        user_password="p",
        seed_file="/s",
        ca_file="/ca",
        cert_file="/c",
        key_file="/k",
        reconnect_wait_s=3.0,
    )
    assert made.uses_tls and not made.bundled


def test_the_bundled_server_offers_tls_only_with_a_certificate_of_its_own() -> None:
    assert not ClientSettings.from_config(config(ca_file="/ca")).uses_tls
    assert ClientSettings.from_config(config(ca_file="/ca", cert_file="/c", key_file="/k")).uses_tls
    assert ClientSettings.from_config(config()).bundled
