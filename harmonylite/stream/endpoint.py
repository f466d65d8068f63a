"""Where a NATS server is, and why connecting to it failed, in words for an operator."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import nats.errors

DEFAULT_PORT = 4222


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server's address. token, or user and password: from the URL, decoded; None if it had none.

    tls_host: the name its certificate is checked for, if that is not `host` (a server that another one named by
    its number).
    """

    scheme: str
    host: str
    port: int | None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls_host: str | None = None

    @property
    def address(self) -> str:
        """host:port, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Without credentials: the client library would take them from here undecoded."""
        return f"{self.scheme}://{self.address}"

    @property
    def is_local(self) -> bool:
        """Is it on this machine?"""
        return self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"


def parse_endpoint(url: str) -> Endpoint:
    """`[scheme://][user:password@ or token@]host[:port]`; raises ValueError."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    if not parts.hostname:
        raise ValueError("a NATS URL without a host")
    web = parts.scheme in ("ws", "wss")
    login = parts.username is not None and unquote(parts.username)
    password = unquote(parts.password) if parts.password is not None else None
    return Endpoint(
        scheme=parts.scheme,
        host=parts.hostname,
        port=parts.port or (None if web else DEFAULT_PORT),
        user=login if login and password is not None else None,
        password=password,
        token=login if login and password is None else None,
    )


@dataclass(frozen=True, slots=True)
class Means:
    """What a connection had to offer: has_login: a user, token or key; has_certificate: one for the client;
    has_ca: an authority to check the server's with; verified: the server asks for a client certificate, and has not
    accepted one yet.
    """

    has_login: bool
    has_certificate: bool
    has_ca: bool
    verified: bool


def explain(error: BaseException, endpoint: Endpoint, means: Means) -> str:
    """One line: what failed, where, what to do."""
    where = endpoint.address
    text = " ".join(str(error).removeprefix("nats: ").split()).strip("'")
    certificate_error = isinstance(error, ssl.SSLCertVerificationError)
    hung_up = isinstance(error, (ssl.SSLError, ConnectionError, nats.errors.UnexpectedEOF))
    if means.verified and hung_up and not certificate_error:
        # TLS 1.3 lets a client begin before it is checked: a refusal may arrive as no more than a closed connection.
        what = (
            "does not accept our client certificate: check"
            if means.has_certificate
            else "wants a client certificate: set"
        )
        return f"{where} {what} [nats] cert_file and key_file"
    if isinstance(error, ssl.SSLError) or "ssl" in text.lower():
        return _explain_tls(error, text, where, has_ca=means.has_ca)
    if "authorization violation" in text.lower() or isinstance(error, nats.errors.AuthorizationError):
        todo = (
            "check [nats] user_name, user_password, seed_file" if means.has_login else "it wants a login, none is set"
        )
        return f"{where} refuses the login: {todo}"
    if isinstance(error, ConnectionRefusedError):
        return f"no server listens at {where}"
    if isinstance(error, socket.gaierror):
        return f"the name {endpoint.host} cannot be resolved: {error.strerror}"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError, nats.errors.TimeoutError)):
        return f"{where} does not answer in time"
    if isinstance(error, OSError):
        return f"{where} cannot be reached: {_system_text(error)}"
    if isinstance(error, nats.errors.UnexpectedEOF):
        return f"{where} closed the connection"
    if "expecting INFO" in text:
        return f"{where} closed the connection before saying anything: is it a NATS server?"
    return f"{where}: {text or type(error).__name__}"


def _system_text(error: OSError) -> str:
    """asyncio wraps the reasons for several addresses of one name into one text."""
    return error.strerror or (errno.errorcode.get(error.errno, "") if error.errno else "") or str(error)


def _explain_tls(error: BaseException, text: str, where: str, *, has_ca: bool) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "" if has_ca else ": set [nats] ca_file to the authority that signed it"
        return f"the certificate of {where} is not accepted ({error.verify_message}){hint}"
    return f"TLS with {where} fails: {text}"
