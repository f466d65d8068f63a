"""The kinds of value in a configuration beyond Python's own: secrets, servers, listen addresses, sizes."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple, final
from urllib.parse import urlsplit

MASK = "********"

# With or without "B" or "iB", as in nats-server's own file; here every suffix is a power of 1024.
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_SIZE_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# To the last @: a password that was not percent-encoded may hold any character.
_LOGIN = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)?.*@", re.DOTALL)


@final
class Secret:
    """A password or key. Printing, formatting and logging show a mask; only `reveal` gives the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        """The secret itself; empty when none was given."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __str__(self) -> str:
        return MASK if self._text else ""

    def __repr__(self) -> str:
        return f"Secret({str(self)!r})"


class ServerUrl(str):
    """The address of a NATS server, in full; `masked` and repr hide what it says of user and password."""

    __slots__ = ()

    @property
    def masked(self) -> str:
        """The address with user and password replaced by a mask."""
        return mask_url(self)

    def __repr__(self) -> str:
        return repr(self.masked)


def mask_url(url: str) -> str:
    """`url` without its user and password: `nats://a:b@host:4222` -> `nats://********@host:4222`."""
    return _LOGIN.sub(rf"\g<1>{MASK}@", url)


class Address(NamedTuple):
    """Where to listen. host: empty for all interfaces; port: 0 for any free one."""

    host: str
    port: int


def one_line(text: str) -> str:
    """`text` with everything unprintable escaped, line ends included: for a line of a log or a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def split_address(text: str, *, any_port: bool = False) -> Address:
    """`host:port`, `:port` or `[v6]:port` as an Address; raises ValueError.

    any_port: the ports 0 and -1 (as nats-server writes it) stand for any free one, and come back as 0.
    """
    if "/" in text or "@" in text:
        raise ValueError("must be host:port, without a scheme or a path")
    host, colon, port_text = text.strip().rpartition(":")
    if not colon:
        hint = f', for example ":{text}"' if text.isdigit() else ""
        raise ValueError(f"must be host:port{hint}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("must be host:port, with an IPv6 host in brackets: [::1]:80")
    if re.search(r"[\s\[\]]", host):
        raise ValueError("must be host:port")
    if re.fullmatch(r"[\d.]+", host) and not _is_ipv4(host):
        raise ValueError(f"must be host:port, but {host} is not an IPv4 address")
    if not re.fullmatch(r"-?\d{1,9}", port_text):
        raise ValueError(f"must be host:port, but the port is {port_text!r}")
    port = int(port_text)
    if any_port and port in (0, -1):
        return Address(host, 0)
    if not 1 <= port <= 65535:
        raise ValueError(f"has a port outside 1 to 65535: {port}")
    return Address(host, port)


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def parse_server_url(text: str, schemes: tuple[str, ...]) -> ServerUrl:
    """A server's address, `scheme://[user:password@]host[:port]` or `host:port`; raises ValueError.

    The text is kept as it is: NATS itself fills in the default port. No error text holds the password.
    """
    url = text.strip()
    parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
    shown = mask_url(url)
    if parts.scheme not in schemes:
        raise ValueError(f"has an address that starts with none of {', '.join(schemes)}: {shown!r}")
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"has an address with a port outside 1 to 65535: {shown!r}") from None
    if "," in (parts.hostname or ""):
        raise ValueError(f"has one text for several addresses: write them as a list, each in its own quotes: {shown!r}")
    if not parts.hostname or port == 0 or re.search(r"[\s<>]", url):
        raise ValueError(f"has an address that is not scheme://host:port: {shown!r}")
    if re.fullmatch(r"[\d.]+", parts.hostname) and not _is_ipv4(parts.hostname):
        raise ValueError(f"has an address whose host is not an IPv4 address: {shown!r}")
    return ServerUrl(url)


def parse_size(text: str) -> int:
    """`512`, `64KB`, `2GB` in bytes (powers of 1024); raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError('must be bytes or a size such as "512MB" or "2GB"')
    return int(match[1]) * _SIZE_FACTORS[match[2].upper()]


def format_size(size: int) -> str:
    """Bytes as the shortest text that `parse_size` reads back exactly, for example `2GB`."""
    for suffix in ("T", "G", "M", "K"):
        if size and size % _SIZE_FACTORS[suffix] == 0:
            return f"{size // _SIZE_FACTORS[suffix]}{suffix}B"
    return str(size)
