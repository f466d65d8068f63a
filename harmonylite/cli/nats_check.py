"""Whether NATS does what the daemon needs of it, for `doctor`: the program, the login, JetStream, the stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from harmonylite.cli.checks import Check, Level
from harmonylite.config import Config, mask_url
from harmonylite.observe import control
from harmonylite.observe.control import ControlError
from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.stream.log import LogError, StreamMissing, stream_info
from harmonylite.stream.server_process import StartError, binary_version, find_binary
from harmonylite.tasks import undisturbed
from harmonylite.wiring import log_settings

CONNECT_TIMEOUT_S = 3.0
LOGIN_TIMEOUT_S = 5.0
API_TIMEOUT_S = 3.0
_OLDEST_SERVER = (2, 9, 0)
_OFFLINE = "the daemon works offline and keeps trying; check address, network and firewall"


def checks(config: Config, *, running: bool) -> Iterator[Check]:
    """External servers take our login and have JetStream; or the bundled server's program is there, its hub answers,
    and, where the daemon runs, JetStream can be used through it."""
    if config.external:
        yield _use("nats", config, config.nats.urls, config.nats.domain or None)
        return
    yield _program(config)
    if config.nats.leaf_servers:
        yield _reachable("hub", config.nats.leaf_servers, 7422)
    if running:
        yield from _own_server(config)


def _program(config: Config) -> Check:
    try:
        binary = find_binary(config.nats.server_binary)
        version = binary_version(binary)
    except StartError as error:
        return Check("nats-server", "fail", str(error))
    text = f"{binary} has version {'.'.join(str(part) for part in version)}"
    if version < _OLDEST_SERVER:
        return Check("nats-server", "fail", text, "2.9 or later is needed")
    return Check("nats-server", "ok", text)


def _own_server(config: Config) -> Iterator[Check]:
    try:
        answer = control.query(config.db_path, {"command": "snapshot-nats"})
        url, domain = str(answer["url"]), answer["domain"]
    except (ControlError, KeyError):
        yield Check("nats", "warn", "the daemon is not connected", _OFFLINE)
        return
    yield _use("nats", config, (url,), domain)


@dataclass(frozen=True, slots=True)
class _Answer:
    """server: who let us in, None if nobody did; problem: what was wrong; text: what the stream holds."""

    server: str | None = None
    problem: str = ""
    text: str = ""


def _use(name: str, config: Config, urls: tuple[str, ...], domain: str | None) -> Check:
    """Log in as the daemon does, and ask for its stream. Nobody there is an ordinary state; all else is not."""
    with _quiet():
        answer = asyncio.run(_ask(config, urls, domain))
    if answer.server is None:
        reached = _reachable(name, urls, 4222)
        if reached.level != "ok":
            return reached
        return Check(name, "fail", f"no connection: {answer.problem}")
    if not answer.problem:
        return Check(name, "ok", f"connected to {answer.server}: {answer.text}")
    through = f" of the hub (domain {domain})" if domain else ""
    text = f"connected to {answer.server}, but JetStream{through} cannot be used: {answer.problem}"
    if domain:
        return Check(name, "warn", text, _OFFLINE)
    return Check(name, "fail", text, "switch JetStream on there, and let this login use it")


async def _ask(config: Config, urls: tuple[str, ...], domain: str | None) -> _Answer:
    connection = Connection(ClientSettings.from_config(config), lambda: urls)
    await connection.start()
    try:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(undisturbed(connection.wait_connected()), LOGIN_TIMEOUT_S)
        server = connection.server
        if server is None:
            return _Answer(problem=connection.last_error or f"no answer within {LOGIN_TIMEOUT_S:g} s")
        settings = replace(log_settings(config, None), domain=domain, api_timeout_s=API_TIMEOUT_S)
        stream = settings.own_stream
        try:
            info, _ = await stream_info(connection.client, settings, stream)
        except StreamMissing:
            return _Answer(server, text=f"JetStream answers, stream {stream} is made by the first node")
        except LogError as error:
            return _Answer(server, problem=str(error))
        return _Answer(server, text=f"stream {stream} holds {info['state']['messages']:,} messages")
    finally:
        await connection.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a daemon would log of its connection is told in one line here."""
    loggers = [logging.getLogger(name) for name in ("harmonylite.stream", "nats")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reachable(name: str, urls: tuple[str, ...], default_port: int) -> Check:
    """Does a NATS server listen? Being offline is an ordinary state; another program in its place is not."""
    failures: list[str] = []
    level: Level = "warn"
    for url in urls:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        try:
            with socket.create_connection(
                (parts.hostname or "", parts.port or default_port), CONNECT_TIMEOUT_S
            ) as link:
                said = b"INFO" if parts.scheme in ("ws", "wss") else _first_words(link)
        except OSError as error:
            failures.append(f"{mask_url(url)}: {error.strerror or error}")
            continue
        if said == b"INFO":
            return Check(name, "ok", f"{mask_url(url)} answers")
        if said:
            level = "fail"
            failures.append(f"{mask_url(url)}: what listens there is no NATS server")
        else:
            failures.append(f"{mask_url(url)}: it takes the connection and says nothing")
    return Check(name, level, f"no answer from {'; '.join(failures)}", _OFFLINE)


def _first_words(link: socket.socket) -> bytes:
    """A NATS server speaks first, on the ports of clients, leaves and clusters alike: `INFO {..}`."""
    link.settimeout(CONNECT_TIMEOUT_S)
    with contextlib.suppress(TimeoutError):
        return link.recv(4)
    return b""
