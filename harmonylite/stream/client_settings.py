"""How to connect to NATS: the settings, and what they mean to the client library."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harmonylite.stream.credentials import Credentials, SettingsError, credentials_in, read_seed
from harmonylite.stream.endpoint import Endpoint

if TYPE_CHECKING:
    from harmonylite.config.model import Config

# The library tries each address twice before it gives up an attempt; this is its pause in between.
_LIBRARY_PAUSE_S = 0.01
# The library's own pings, which end a connection without a word from us, as good as off: see `Connection`.
_LIBRARY_PING_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings(Credentials):
    """How to connect; empty texts mean "not set".

    urls: servers, tried in turn; bundled: it is this node's own nats-server (its certificate need not name
    127.0.0.1, and other servers that it knows are none of our business); reconnect_wait_s: between two rounds;
    ping_interval_s, pong_timeout_s: how often a silent server is asked whether it lives, and how long it may take
    to answer; without a value it depends on where the server is.
    """

    node_id: int
    urls: tuple[str, ...] = ()
    bundled: bool = False
    reconnect_wait_s: float = 2.0
    connect_timeout_s: float = 10.0
    ping_interval_s: float | None = None
    pong_timeout_s: float | None = None

    @classmethod
    def from_config(cls, config: Config) -> ClientSettings:
        """The settings in `config`; without `urls` there, for the bundled server, whose URL `Connection` is told."""
        nats = config.nats
        return cls(
            node_id=config.node_id,
            urls=nats.urls,
            bundled=not nats.urls,
            reconnect_wait_s=nats.reconnect_wait_seconds,
            **credentials_in(config),
        )

    @property
    def uses_tls(self) -> bool:
        """Must connections be encrypted? Whoever names certificates never sends a password without them."""
        if self.bundled:
            return bool(self.cert_file)  # without one of its own, the bundled server cannot offer TLS
        return bool(self.ca_file or self.cert_file)


def connect_options(settings: ClientSettings, endpoint: Endpoint) -> dict[str, Any]:
    """Arguments for the client library's `connect`, for one try at one server. Raises SettingsError.

    Credentials in the URL come before the configured ones, as in Go's client.
    """
    options: dict[str, Any] = {
        "servers": [endpoint.url],
        "name": f"harmonylite-node-{settings.node_id}",
        # Its own prefix, so that a server can allow this node to read its own answers and nobody else's.
        "inbox_prefix": f"_INBOX_{settings.node_id}",
        "allow_reconnect": False,
        "max_reconnect_attempts": 1,
        "reconnect_time_wait": _LIBRARY_PAUSE_S,
        "connect_timeout": settings.connect_timeout_s,
        "ping_interval": _LIBRARY_PING_S,
    }
    if endpoint.token is not None:
        options["token"] = endpoint.token
    elif endpoint.user is not None:
        options |= {"user": endpoint.user, "password": endpoint.password}
    elif settings.user_name:
        options |= {"user": settings.user_name, "password": settings.user_password}
    if settings.seed_file:
        options["nkeys_seed_str"] = read_seed(settings.seed_file).seed
    if settings.ca_file or settings.cert_file:
        options["tls"] = _tls(settings)
    options["tls_hostname"] = endpoint.tls_host or endpoint.host
    return options


def _tls(settings: ClientSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"[nats] ca_file {settings.ca_file} cannot be used: {error.strerror}") from None
    # Python 3.13 began to refuse authorities without every extension of RFC 5280, as people make with openssl in one
    # line. nats-server takes them; an upgrade of Python must not cut a fleet off.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.cert_file:
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"[nats] cert_file {settings.cert_file} with key_file {settings.key_file} cannot be used: "
                f"{error.strerror}"
            ) from None
    if settings.bundled:
        context.check_hostname = False  # our own certificate, shown at 127.0.0.1; its signature is checked
    return context
