"""What the bundled nats-server says: its log lines with their level, and what they mean for an operator."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmonylite.stream.server_settings import ServerSettings

log = logging.getLogger(__name__)

# "[4711] [ERR] text"; a time stands between the two only if an operator's file asks for it.
_LINE = re.compile(r"\[\d+\] (?:\d{4}/\d\d/\d\d [\d:.]+ )?\[(INF|WRN|ERR|FTL|DBG|TRC)\] ?(.*)")
_LEVELS = {
    "TRC": logging.DEBUG,
    "DBG": logging.DEBUG,
    "INF": logging.DEBUG,
    "WRN": logging.WARNING,
    "ERR": logging.ERROR,
    "FTL": logging.CRITICAL,
}
# Follows from the configuration we write (0600, loopback): nothing to act on.
_EXPECTED = re.compile(r"Plaintext passwords detected")
# A hub or a peer that is away: the normal state of a device, not an error of its server.
_UNREACHABLE = re.compile(r"Error trying to connect (?:as leafnode|to route|to remote)")
_LINK = re.compile(r"leafnode|\blid:\d|\brid:\d|to route|route error", re.IGNORECASE)
# Only a connection that we made is "for account"; it says nothing yet about whether the hub accepts it.
# Two servers of one name push each other off the hub, again and again.
DUPLICATE_NODE = (
    "another device with this node_id is connected to the hub: give this one its own (a cloned card keeps the old one)"
)
_DIALLED = re.compile(r"\b(lid:\d+) - Leafnode connection created for account")
_HUNG_UP = re.compile(r"\b(lid:\d+) - Leafnode connection closed: (.*?)(?: - Remote:.*| account:.*)?$")
_REFUSED_BY_US = re.compile(r"authentication error")
_LINK_UP = re.compile(r"JetStream using domains|JetStream Not Extended|Route connection created")
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_DAMAGED = re.compile(
    r"metafile|checksums? d|corrupt|Error (?:recovering|recreating|restoring)|Critical write error"
    r"|read-only file system|input/output error",
    re.IGNORECASE,
)
_LISTEN = re.compile(r"Error listening on (leafnode |router )?port: (?:\S*:)?(\d+)")
_LISTEN_SETTING = {"leafnode ": "leaf_listen", "router ": "cluster_addr", None: "bind_address"}
_CRASH = re.compile(r"panic:|fatal error:|SIG[A-Z]+:")

_LONGEST_LINE = 4096
_REPEAT_AFTER_S = 60.0
_MOST_REMEMBERED = 200
# Two devices of one name push each other off the hub every second.
_MOST_LINK_NEWS, _LINK_NEWS_S = 4, 60.0


class ServerLog:
    """Forwards one server's output to our log, and remembers what its end and its state can be explained with.

    error: the last error in the server's words; fatal: the one it ended with; disk_full: a write failed for want of
    space (such a stream stays dead until the server restarts); storage_error: what is wrong with the store;
    link_error: why the hub or a peer cannot be reached, None once it can.
    """

    def __init__(self, *, dials: bool = True) -> None:
        """dials: does this server connect to others? On one that only listens, such errors are a visitor's."""
        self._dials = dials
        self.error: str | None = None
        self.fatal: str | None = None
        self.disk_full = False
        self.storage_error: str | None = None
        self.link_error: str | None = None
        self._dialled: str | None = None
        self._link_was_up = False
        self._link_explained = False
        self._rest = b""
        self._crashed = False
        self._reported: dict[str, float] = {}

    @property
    def link_up(self) -> bool | None:
        """Has the hub, or a peer, accepted us? None: not known yet."""
        if self.link_error is not None:
            return False
        return True if self._link_was_up else None

    def feed(self, data: bytes) -> bool:
        """Take a piece of output; True if storage_error, link_error or link_up changed."""
        before = (self.storage_error, self.link_error, self.link_up)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_LONGEST_LINE]
        for line in lines:
            self._line(line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip())
        return before != (self.storage_error, self.link_error, self.link_up)

    def end(self) -> None:
        """The output has ended: a last line may lack its line break."""
        self.feed(b"\n")

    def _line(self, line: str) -> None:
        level, text = self._parse(line)
        if not text:
            return
        if self._dials and self._follow_link(text):
            level = logging.WARNING
        if level >= logging.WARNING:
            self._remember(level, text)
        if level >= logging.WARNING and (_EXPECTED.search(text) or self._is_repeated(text)):
            level = logging.DEBUG
        elif _UNREACHABLE.search(text):
            level = logging.WARNING
        log.log(min(level, logging.ERROR), "nats-server reports", extra={"fields": {"text": text}})

    def _parse(self, line: str) -> tuple[int, str]:
        if match := _LINE.fullmatch(line):
            return _LEVELS[match[1]], match[2].strip()
        if line.startswith("nats-server: "):  # before its log works: mistakes in the configuration
            return logging.CRITICAL, line.removeprefix("nats-server: ")
        if self._crashed:
            return logging.DEBUG, line  # the stacks of all goroutines
        self._crashed = bool(_CRASH.match(line))
        return (logging.CRITICAL if self._crashed else logging.WARNING), line

    def _follow_link(self, text: str) -> bool:
        """Our own connection to a hub or peer comes up or goes: True if it went, and nothing else says so."""
        if match := _DIALLED.search(text):
            self._dialled, self._link_was_up, self._link_explained = match[1], False, False
        elif _LINK_UP.search(text):
            self.link_error, self._link_was_up = None, True
        elif (match := _HUNG_UP.search(text)) and match[1] == self._dialled and match[2] != "Server Shutdown":
            if self._link_explained:
                return True
            if self._link_was_up:
                # HubLink says it.
                self.link_error = f"the connection to the hub was lost ({match[2]})"
                return False
            self.link_error = (
                f"the hub closes each connection without a word ({match[2]}): it may want a client certificate "
                "or a login ([nats] cert_file, seed_file, user_name)"
            )
            return True
        return False

    def _remember(self, level: int, text: str) -> None:
        if level >= logging.CRITICAL:
            self.fatal = text
        elif level >= logging.ERROR:
            self.error = text
        if _DISK_FULL.search(text):
            self.disk_full = True
            self.storage_error = f"the disk is full: {text}"
        elif _DAMAGED.search(text) and not self.disk_full:
            self.storage_error = text
        if self._dials and level == logging.ERROR and _LINK.search(text) and not _REFUSED_BY_US.search(text):
            self.link_error, self._link_explained = _explain_link(text), True

    def _is_repeated(self, text: str) -> bool:
        """Was the same, but for numbers in it, logged within the last minute?"""
        kind, now = re.sub(r"\d+", "#", text), time.monotonic()
        if now - self._reported.get(kind, -_REPEAT_AFTER_S) < _REPEAT_AFTER_S:
            return True
        if len(self._reported) >= _MOST_REMEMBERED:
            self._reported.clear()
        self._reported[kind] = now
        return False


class HubLink:
    """Logs that a leaf's link to its hub came or went: one line each, a few within a minute.

    hub: the addresses that are dialled. It outlives the servers: one that starts again is no news.
    """

    def __init__(self, hub: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._hub = ", ".join(hub)
        self._clock = clock
        self._told: bool | None = None
        self._since = clock()
        self._times: deque[float] = deque(maxlen=_MOST_LINK_NEWS)

    def follow(self, said: ServerLog) -> None:
        """Log what is the case if it is news. Call it now and then, too: what came too fast is told later."""
        now = self._clock()
        crowded = len(self._times) == _MOST_LINK_NEWS and now - self._times[0] < _LINK_NEWS_S
        if said.link_up is None or said.link_up == self._told or crowded:
            return
        fields: dict[str, object] = {"hub": self._hub}
        if said.link_up:
            if self._told is not None:
                fields["after_s"] = now - self._since
            log.info("connected to the hub", extra={"fields": fields})
        else:
            event = "no connection to the hub" if self._told is None else "connection to the hub lost"
            fields["error"] = said.link_error
            log.warning(f"{event}; changes wait until it is back", extra={"fields": fields})
        self._times.append(now)
        self._told, self._since = said.link_up, now


def _explain_link(text: str) -> str:
    if "Authorization Violation" in text:
        return f"the other server refuses the login ([nats] user_name, user_password or seed_file): {text}"
    if "x509" in text or "tls" in text.lower():
        return f"TLS fails ([nats] ca_file, cert_file, key_file): {text}"
    if "Duplicate Remote LeafNode Connection" in text:
        return DUPLICATE_NODE
    return text


def explain_end(code: int, said: ServerLog, settings: ServerSettings) -> str:
    """Why a server ended with `code` (negative: by that signal), in one line for an operator. Reads /proc."""
    text = said.fatal or (said.error if code > 0 else None)
    if text is None:
        return f"nats-server was killed by signal {-code}" if code < 0 else f"nats-server ended with code {code}"
    if match := _LISTEN.search(text):
        return _explain_listen(text, f"[nats] {_LISTEN_SETTING[match[1]]}", int(match[2]))
    if _DISK_FULL.search(text):
        return f"the disk of {settings.store_dir} is full: {text}"
    if "Can't start JetStream" in text or "store directory" in text.lower():
        return f"the store {settings.store_dir} ([nats] store_dir) cannot be used: {text}"
    if settings.server_config and re.search(r"unknown field|Parse error|parsing include|\.conf:\d+", text):
        return f"nats-server refuses its configuration, of which [nats] server_config is a part: {text}"
    return f"nats-server: {text}"


def _explain_listen(text: str, setting: str, port: int) -> str:
    if "address already in use" in text:
        owner = port_owner(port)
        return f"port {port} ({setting}) is in use by {owner or 'another process'}: end that, or choose another port"
    if "cannot assign requested address" in text:
        return f"{setting} names an address that this machine does not have: {text}"
    if "permission denied" in text:
        return f"port {port} ({setting}) needs more rights: choose one above 1023"
    return f"{setting}: {text}"


@dataclass(frozen=True, slots=True)
class PortOwner:
    """A process that listens, and the one that started it (0: unknown). As text: "process 4711 (name)"."""

    pid: int
    parent: int
    name: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name})"


def port_owner(port: int) -> PortOwner | None:
    """The process that listens on TCP `port`; None if it cannot be seen (another user's) or is gone."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    owner = next((p for p in Path("/proc").glob("[0-9]*") if sockets and _has_open(p, sockets)), None)
    if owner is None:
        return None
    try:
        # proc(5), /proc/pid/stat: pid, name in parentheses, state, parent.
        stat = (owner / "stat").read_text()
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return PortOwner(int(owner.name), int(rest.split()[1]), name)


def _has_open(process: Path, sockets: set[str]) -> bool:
    try:
        return any(str(handle.readlink()) in sockets for handle in (process / "fd").iterdir())
    except OSError:  # gone, or not ours to see
        return False


def _listening_inodes(port: int) -> set[str]:
    """Inodes of listening sockets. Columns and state 0A (listen): proc(5), /proc/net/tcp."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, lines):
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(columns[9])
    return inodes
