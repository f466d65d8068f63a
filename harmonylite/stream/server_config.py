"""What the bundled nats-server is to be (`ServerSettings`), and the configuration file that makes it so.

Four shapes (`[nats]` keys in brackets):

- alone: JetStream, for this machine only;
- hub (`leaf_listen`): JetStream with a domain, leaves connect to it;
- leaf (`leaf_servers`): no JetStream, everything is stored on the hub: the card is written once;
- cluster (`cluster_addr`, `cluster_peers`): JetStream with replicas; together with `leaf_listen` a hub of several.

The operator's own file (`server_config`) comes on top: whatever it sets is left out of ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote as quote_url
from urllib.parse import urlsplit

from harmonylite.config.values import split_address
from harmonylite.stream import nats_conf
from harmonylite.stream.credentials import SettingsError, read_seed
from harmonylite.stream.nats_conf import Block, quote
from harmonylite.stream.server_settings import ServerSettings

__all__ = ["ServerPlan", "ServerSettings", "SettingsError", "plan_server", "store_limit"]

DEFAULT_DOMAIN = "hub"
# The name that the Go implementation gave its clusters: servers of both can meet while a fleet is being moved.
CLUSTER_NAME = "e-harmonylite"
# A version that knows everything we may write, to check the settings before any program was found.
ASSUMED_VERSION = (2, 12, 0)
OLDEST_VERSION = (2, 9, 0)
# A leaf tells the hub is gone when two pings in a row stay unanswered: after 30 s at most. Tighter, and a large
# upload over a slow link, behind which the ping queues, would look like a dead hub and be started over for ever.
_PING_INTERVAL = "10s"
_PING_MAX = 2
# Failed attempts to reach the hub or a peer come about once a second; one log line a minute is enough.
_REPORT_EVERY_NTH_ATTEMPT = 60
_SMALLEST_STORE = 1 << 20
USABLE_SHARE = 0.75

# Which settings of an operator's file stand for one of ours (names: nats-server's server/opts.go).
_LISTEN = ("listen", "port", "host", "net")
_AUTHORIZATION = ("authorization", "accounts", "operator", "operators", "resolver", "system_account")
_LEAFNODES = ("leafnodes", "leaf")
_STORE = ("store_dir", "storedir")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """What will run.

    shape: "alone", "hub", "leaf" or "cluster"; jetstream: does this server store streams; domain: the JetStream
    domain that a client of this server must name, None for none; replicas_possible: the number of servers that can
    hold copies, as far as this node knows (None on a leaf: the hub decides); memory_limit: a soft limit, for
    GOMEMLIMIT; warnings: one line each, for operators; text: the configuration file, secrets included.
    """

    shape: str
    jetstream: bool
    domain: str | None
    replicas_possible: int | None
    memory_limit: str
    warnings: tuple[str, ...]
    text: str = field(repr=False)


def plan_server(settings: ServerSettings, version: tuple[int, int, int], *, max_store: int) -> ServerPlan:
    """The plan for a nats-server of `version`; max_store: bytes, see `store_limit`. Raises SettingsError."""
    return _Planner(settings, version, max_store).plan()


def store_limit(store_dir: Path, configured: int = 0) -> int:
    """How many bytes JetStream may use: `configured`, or less if the file system could not hold it.

    Reaching `max_file_store` makes the server refuse messages until there is room again; a disk that is really
    full kills the stream until the server restarts. So a quarter of what is free stays out of reach.
    """
    usable = int((free_bytes(store_dir) + sum(_file_sizes(store_dir))) * USABLE_SHARE)
    return max(_SMALLEST_STORE, min(usable, configured or usable))


def free_bytes(folder: Path) -> int:
    """What this user may still write to the file system of `folder`, which need not exist yet."""
    disk = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    return disk.f_bavail * disk.f_frsize


def _file_sizes(folder: Path) -> Iterator[int]:
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # JetStream removed it in the meantime
                yield Path(directory, name).stat().st_size


def _is_open(listen: str) -> bool:
    """Whether other machines reach an address."""
    host = split_address(listen, any_port=True).host if listen else "localhost"
    return host != "localhost" and not host.startswith("127.") and host != "::1"


class _Planner:
    def __init__(self, settings: ServerSettings, version: tuple[int, int, int], max_store: int) -> None:
        self._settings = settings
        self._version = version
        self._max_store = max_store
        self._warnings: list[str] = []
        self._theirs: Block = self._read_theirs()

    def plan(self) -> ServerPlan:
        self._check()
        shape, jetstream = self._shape()
        leaf = shape == "leaf"
        text = "\n".join(self._lines(shape)) + "\n"
        return ServerPlan(
            shape=shape,
            jetstream=jetstream,
            domain=(self._settings.domain or DEFAULT_DOMAIN) if leaf else None,
            replicas_possible=None if leaf else len(self._peers()) + 1,
            memory_limit={"leaf": "24MiB", "alone": "32MiB"}.get(shape, "64MiB"),
            warnings=tuple(self._warnings),
            text=text,
        )

    def _read_theirs(self) -> Block:
        name = self._settings.server_config
        if not name:
            return {}
        try:
            return nats_conf.read_file(Path(name).absolute())
        except (OSError, RecursionError) as error:
            raise SettingsError(f"[nats] server_config {name} cannot be read: {error}") from None

    def _check(self) -> None:
        settings = self._settings
        if self._version < OLDEST_VERSION:
            raise SettingsError(
                f"nats-server {_dotted(self._version)} is too old: {_dotted(OLDEST_VERSION)} or later is needed"
            )
        if settings.leaf_servers and settings.cluster_peers:
            raise SettingsError("[nats] leaf_servers and cluster_peers exclude each other: a leaf stores no streams")
        if settings.cluster_peers and not settings.cluster_addr:
            raise SettingsError("[nats] cluster_peers needs cluster_addr, where the peers reach this node")
        if bool(settings.cert_file) != bool(settings.key_file):
            raise SettingsError("[nats] cert_file and key_file belong together: one of them is not set")
        if settings.user_name and not settings.user_password and not self._sets(*_AUTHORIZATION):
            # nats-server takes an empty password for one: whoever knows the name would be let in.
            raise SettingsError(
                "[nats] user_name is set and no password is: set user_password or user_password_file, or hand the"
                " credential nats_user_password to the service"
            )
        if settings.user_password.startswith("$2") and settings.user_password[3:4] == "$":
            # nats-server would take it for a bcrypt hash and then refuse the very same text from a client.
            raise SettingsError("[nats] user_password is a bcrypt hash: set the password itself")
        if any(map(_is_open, (settings.bind_address, settings.leaf_listen, settings.cluster_addr))) and not (
            settings.user_name or settings.seed_file or self._sets(*_AUTHORIZATION) or self._verifies()
        ):
            self._warnings.append(
                "the server is open to everybody who reaches it: set [nats] user_name and user_password, or seed_file"
            )
        if settings.cluster_addr and not settings.cluster_peers:
            self._warnings.append(
                "[nats] cluster_addr is ignored: cluster_peers does not name the other nodes, so this one runs alone"
            )
        elif settings.cluster_peers and len(self._peers()) == 1:
            self._warnings.append(
                "a cluster of two stops when either of them does: use three nodes, or a hub and a leaf"
            )

    def _shape(self) -> tuple[str, bool]:
        """The shape, and whether JetStream runs; an operator's file can decide both."""
        theirs = self._theirs
        if self._sets("jetstream"):
            enabled = theirs["jetstream"] not in ("false", "disabled", "disable", "off", "no", "0")
            if not enabled and not (self._settings.leaf_servers or self._their_remotes()):
                self._warnings.append("[nats] server_config switches JetStream off: nothing can be replicated")
        else:
            enabled = not (self._settings.leaf_servers or self._their_remotes())
        if not enabled:
            return "leaf", False
        if self._peers() or self._sets("cluster"):
            return "cluster", True
        return ("hub" if self._settings.leaf_listen or self._sets(*_LEAFNODES) else "alone"), True

    def _sets(self, *names: str) -> bool:
        return any(name in self._theirs for name in names)

    def _their_remotes(self) -> bool:
        return any(isinstance(block := self._theirs.get(name), dict) and "remotes" in block for name in _LEAFNODES)

    def _peers(self) -> tuple[str, ...]:
        """The other servers of the cluster: a list of all nodes, this one included, is fine too."""
        own = _address(self._settings.cluster_addr)
        return tuple(
            dict.fromkeys(peer for peer in self._settings.cluster_peers if _address(urlsplit(_url(peer)).netloc) != own)
        )

    def _lines(self, shape: str) -> Iterator[str]:
        settings = self._settings
        yield f"# Generated for node {settings.node_id} at every start: changes here are lost."
        yield "# Settings of your own belong into a file that [nats] server_config names."
        yield from self._unless(("server_name",), f"server_name: {quote(settings.node_name)}")
        yield from self._unless(_LISTEN, f"listen: {quote(_listen(settings.bind_address))}")
        yield from self._unless(("logtime",), "logtime: false")
        yield from self._unless(("ping_interval",), f"ping_interval: {quote(_PING_INTERVAL)}")
        yield from self._unless(("ping_max",), f"ping_max: {_PING_MAX}")
        for name in ("connect_error_reports", "reconnect_error_reports"):
            yield from self._unless((name,), f"{name}: {_REPORT_EVERY_NTH_ATTEMPT}")
        yield from self._unless(_AUTHORIZATION, *self._authorization())
        yield from self._unless(("tls",), *self._listener_tls())
        yield from self._jetstream(shape)
        yield from self._unless(_LEAFNODES, *self._leafnodes(shape))
        yield from self._unless(("cluster",), *self._cluster(shape))
        if settings.server_config:
            yield f"include {self._include()}"

    def _unless(self, theirs: tuple[str, ...], *lines: str) -> Iterator[str]:
        if not self._sets(*theirs):
            yield from lines

    def _include(self) -> str:
        # The language takes the path as relative to our file's folder, even one that begins with a slash.
        target = Path(self._settings.server_config).absolute()
        relative = os.path.relpath(target, self._settings.data_dir.absolute())
        try:
            return nats_conf.quote_path(Path(relative))
        except ValueError as error:
            raise SettingsError(f"[nats] server_config: {error}") from None

    def _authorization(self) -> Iterator[str]:
        settings, users = self._settings, []
        if settings.user_name:
            users.append(f"{{ user: {quote(settings.user_name)}, password: {quote(settings.user_password)} }}")
        if settings.seed_file:
            users.append(f"{{ nkey: {quote(read_seed(settings.seed_file).public_key)} }}")
        if users:
            yield f"authorization {{ users: [ {', '.join(users)} ] }}"

    def _verifies(self) -> bool:
        """Whether who connects has to show a certificate."""
        return bool(self._settings.cert_file and self._settings.ca_file)

    def _listener_tls(self) -> Iterator[str]:
        if self._settings.cert_file:
            yield self._tls(verify=self._verifies())

    def _tls(self, *, verify: bool = False) -> str:
        settings = self._settings
        parts = [
            f"{name}: {quote(str(Path(value).absolute()))}"
            for name, value in (
                ("ca_file", settings.ca_file),
                ("cert_file", settings.cert_file),
                ("key_file", settings.key_file),
            )
            if value
        ]
        return f"tls {{ {', '.join(parts)}{', verify: true' if verify else ''} }}"

    def _jetstream(self, shape: str) -> Iterator[str]:
        settings = self._settings
        block = self._theirs.get("jetstream")
        if shape != "leaf" and not self._sets(*_STORE) and not (isinstance(block, dict) and set(_STORE) & set(block)):
            # At the top level, so that it also holds for a jetstream block of theirs that names no folder:
            # the server's own choice would be a temporary one.
            yield f"store_dir: {quote(str(settings.store_dir))}"
        if shape == "leaf" or self._sets("jetstream"):
            return
        yield "jetstream {"
        yield f"  max_file_store: {self._max_store}"
        domain = settings.domain or (DEFAULT_DOMAIN if settings.leaf_listen else "")
        if domain:
            yield f"  domain: {quote(domain)}"
        interval = self._sync_interval()
        if self._version >= (2, 10, 0):
            yield f"  sync_interval: {quote(interval)}"
        elif settings.sync_interval or interval == "always":
            self._warnings.append(
                f"nats-server {_dotted(self._version)} cannot sync its store to disk at an interval ({interval}): "
                "2.10 or later can"
            )
        yield "}"

    def _sync_interval(self) -> str:
        """How soon what was acknowledged survives a power cut.

        A server that alone holds the changes of others syncs each message before it acknowledges it; with three
        copies, or for a node's own changes, which its database still has, every ten seconds (which writes no
        more bytes than the server's two minutes).
        """
        settings = self._settings
        shared = bool(settings.leaf_listen or settings.cluster_peers or self._sets("cluster", *_LEAFNODES))
        return settings.sync_interval or ("always" if shared and settings.replicas < 3 else "10s")

    def _leafnodes(self, shape: str) -> Iterator[str]:
        settings = self._settings
        if not settings.leaf_listen and not settings.leaf_servers:
            return
        yield "leafnodes {"
        yield from self._no_compression()
        if settings.leaf_listen:
            yield f"  listen: {quote(_listen(settings.leaf_listen))}"
            # Leaves know where to connect. What a hub sees of itself behind NAT or in a container leads nowhere, and
            # past the way that was chosen for them. Not `no_advertise`: leaves of 2.9 take a hub that names no address
            # for "wrong port". Port 1 refuses at once; newer leaves are told to ignore it, below.
            yield '  advertise: "127.0.0.1:1"'
            yield from (f"  {line}" for line in self._listener_tls())
        if settings.leaf_servers:
            # One remote with several addresses: the servers of one hub, of which any will do.
            urls = ", ".join(quote(self._with_credentials(url)) for url in settings.leaf_servers)
            yield "  remotes: [ {"
            yield f"    urls: [ {urls} ]"
            if self._version >= (2, 14, 0):
                yield "    ignore_discovered_servers: true"
            if settings.seed_file:
                if self._version < (2, 10, 0):
                    raise SettingsError(
                        f"nats-server {_dotted(self._version)} cannot log in to a hub with a seed_file: "
                        "use 2.10 or later, or user_name and user_password"
                    )
                yield f"    nkey: {quote(read_seed(settings.seed_file).seed)}"
            if settings.ca_file or settings.cert_file:
                yield f"    {self._tls()}"
            yield "  } ]"
        yield "}"

    def _cluster(self, shape: str) -> Iterator[str]:
        settings, peers = self._settings, self._peers()
        if not peers:
            return
        yield "cluster {"
        yield f"  name: {quote(CLUSTER_NAME)}"
        yield f"  listen: {quote(_listen(settings.cluster_addr))}"
        yield from self._no_compression()
        if settings.user_name:
            yield f"  authorization {{ user: {quote(settings.user_name)}, password: {quote(settings.user_password)} }}"
        yield from (f"  {line}" for line in self._listener_tls())
        yield f"  routes: [ {', '.join(quote(self._with_credentials(peer)) for peer in peers)} ]"
        yield "}"

    def _no_compression(self) -> Iterator[str]:
        if self._version >= (2, 10, 0):
            yield "  compression: off"  # changes are compressed already, and s2 costs tens of megabytes

    def _with_credentials(self, url: str) -> str:
        settings, parts = self._settings, urlsplit(_url(url))
        scheme = parts.scheme if parts.scheme in ("tls", "ws", "wss") else "nats"
        login, _, place = parts.netloc.rpartition("@")
        if not login and settings.user_name:
            login = f"{quote_url(settings.user_name, safe='')}:{quote_url(settings.user_password, safe='')}"
        return f"{scheme}://{login}@{place}" if login else f"{scheme}://{place}"


def _listen(address: str) -> str:
    """`address` as nats-server wants it; where no host or port is given: loopback, any free port.

    ":4222" listens on all interfaces, as it did in the Go implementation.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        host, port = address, "-1"
    port = "-1" if port in ("", "0", "-1") else port
    return f"{host or ('127.0.0.1' if port == '-1' else '0.0.0.0')}:{port}"


def _url(text: str) -> str:
    return text if "://" in text else f"nats://{text}"


def _address(netloc: str) -> str:
    """host:port for comparing, without credentials."""
    return netloc.rpartition("@")[2].rstrip("/").lower().replace("localhost", "127.0.0.1")


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
