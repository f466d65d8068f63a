"""The `[nats]` settings of the bundled nats-server, checked files and addresses among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmonylite.config.model import Config


class SettingsError(ValueError):
    """The settings contradict each other or a file they name cannot be used; the text is one line for operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
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
    user_name: str = ""
    user_password: str = field(default="", repr=False)
    seed_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

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
            user_name=nats.user_name,
            user_password=nats.user_password.reveal(),
            seed_file=nats.seed_file,
            ca_file=nats.ca_file,
            cert_file=nats.cert_file,
            key_file=nats.key_file,
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


@dataclass(frozen=True, slots=True)
class Seed:
    """An nkey seed and its public key."""

    seed: str = field(repr=False)
    public_key: str


def read_seed(name: str) -> Seed:
    """The nkey seed in the file `name`: the line that begins with `SU`. Raises SettingsError."""
    try:
        lines = Path(name).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"[nats] seed_file {name} cannot be read: {error}") from None
    seed = next((line for line in lines if line.startswith("SU")), None)
    if seed is None:
        raise SettingsError(f'[nats] seed_file {name} holds no user seed (a line that begins with "SU")')
    try:
        import nkeys
    except ImportError:
        raise SettingsError("[nats] seed_file needs the Python package nkeys, which is not installed") from None
    try:
        pair = nkeys.from_seed(bytearray(seed.encode()))
        return Seed(seed, pair.public_key.decode())
    except Exception:  # nkeys raises its own errors, binascii's and plain ValueError; none may show the seed
        raise SettingsError(f"[nats] seed_file {name} holds a damaged seed") from None
