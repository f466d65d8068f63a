"""The `[nats]` settings of the bundled nats-server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harmonylite.stream.credentials import Credentials, credentials_in

if TYPE_CHECKING:
    from harmonylite.config.model import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(Credentials):
    """The `[nats]` settings of the bundled server; empty texts and tuples mean "not set".

    data_dir: folder for our generated files and, in a folder named as the node, for the streams; max_store: bytes,
    0 for as much as the disk allows; sync_interval: empty for the choice in `_sync_interval`; replicas: the copies
    that streams are to have.
    """

    node_id: int
    data_dir: Path
    bind_address: str = ""
    cluster_addr: str = ""
    cluster_peers: tuple[str, ...] = ()
    leaf_listen: str = ""
    leaf_servers: tuple[str, ...] = ()
    domain: str = ""
    max_store: int = 0
    sync_interval: str = ""
    replicas: int = 1
    server_binary: str = ""
    server_config: str = ""

    @classmethod
    def from_config(cls, config: Config) -> ServerSettings:
        """The settings in `config`."""
        nats = config.nats
        return cls(
            node_id=config.node_id,
            data_dir=config.data_dir,
            bind_address=nats.bind_address,
            cluster_addr=nats.cluster_addr,
            cluster_peers=nats.cluster_peers,
            leaf_listen=nats.leaf_listen,
            leaf_servers=nats.leaf_servers,
            domain=nats.domain,
            max_store=nats.max_store,
            sync_interval=nats.sync_interval,
            replicas=config.replication_log.replicas,
            server_binary=nats.server_binary,
            server_config=nats.server_config,
            **credentials_in(config),
        )

    @property
    def node_name(self) -> str:
        """The server's name; JetStream demands that it is unique in a cluster and never changes."""
        return f"harmonylite-node-{self.node_id}"

    @property
    def store_dir(self) -> Path:
        """Where the streams are: the folder that the Go implementation used."""
        return self.data_dir.absolute() / self.node_name

    def own_file(self, suffix: str) -> Path:
        """One of our generated files: `<data_dir>/<node name><suffix>`."""
        return self.data_dir.absolute() / f"{self.node_name}{suffix}"
