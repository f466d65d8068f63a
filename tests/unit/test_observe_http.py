"""The HTTP endpoints: right answers, bounds on what a client can take, and a port that is in use."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from harmonylite.observe import http
from harmonylite.observe.http import HttpServer, Response
from harmonylite.observe.metrics import CONTENT_TYPE, Metrics

BIG = b"x" * (64 << 20)


def broken() -> Response:
    raise RuntimeError("no idea")


ROUTES = {
    "/health": lambda: Response(503, "application/json", b'{"status": "unhealthy"}'),
    "/metrics": lambda: Response(200, CONTENT_TYPE, Metrics().render()),
    "/broken": broken,
    "/big": lambda: Response(200, "text/plain", BIG),
}


@asynccontextmanager
async def serving(bind: str = "127.0.0.1:0", bind_retry_s: float = 10.0) -> AsyncIterator[HttpServer]:
    server = HttpServer("test", bind, ROUTES, bind_retry_s=bind_retry_s)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def exchange(port: int, request: bytes, host: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body of the answer; the server must close."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    version, code, _ = first.split(" ", 2)
    assert version == "HTTP/1.1"
    return int(code), {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: here\r\nUser-Agent: test\r\n\r\n".encode()


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


def test_get_and_head() -> None:
    async def main() -> None:
        async with serving() as server:
            assert server.port
            code, headers, body = await exchange(server.port, get("/health?probe=1"))
            assert (code, body) == (503, b'{"status": "unhealthy"}')
            assert headers["content-type"] == "application/json"
            assert headers["connection"] == "close" and headers["cache-control"] == "no-store"
            assert headers["content-length"] == str(len(body))
            code, headers, body = await exchange(server.port, get("/health", "HEAD"))
            assert (code, body, headers["content-length"]) == (503, b"", "23")
            code, headers, body = await exchange(server.port, get("/metrics"))
            assert (code, headers["content-type"]) == (200, CONTENT_TYPE)
            assert b"\nharmonylite_published 0.0\n" in body

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (get("/nowhere"), 404),
        (get("/health/"), 404),
        (get("/health", "POST"), 405),
        (get("/health", "DELETE"), 405),
        (get("/broken"), 500),
        (b"GET /health\r\n\r\n", 400),
        (b"GET health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health SPDY/3\r\n\r\n", 400),
        (b"\x16\x03\x01\xff\x00\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\n\r\n", 503),
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 9000, 431),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
    ],
)
def test_everything_else_gets_a_clear_answer(request_bytes: bytes, code: int) -> None:
    async def main() -> None:
        async with serving() as server:
            assert server.port
            found, headers, _ = await exchange(server.port, request_bytes)
            assert found == code
            assert headers.get("allow") == ("GET, HEAD" if code == 405 else None)

    asyncio.run(main())


def test_a_handler_that_fails_is_logged_once_and_the_server_lives(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving() as server:
            assert server.port
            for _ in range(3):
                assert (await exchange(server.port, get("/broken")))[0] == 500
            assert (await exchange(server.port, get("/health")))[0] == 503

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    (record,) = caplog.records
    assert "no idea" in record.__dict__["fields"]["error"]


def test_a_client_that_sends_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with serving() as server:
            assert server.port
            assert (await exchange(server.port, b"GET /hea"))[0] == 408

    asyncio.run(main())


def test_a_client_that_hangs_up_early_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving() as server:
            assert server.port
            for data in (b"", b"GET /hea", get("/health")):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(data)
                writer.close()
            assert (await exchange(server.port, get("/health")))[0] == 503

    asyncio.run(main())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_does_not_read_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 1)

    async def main() -> None:
        async with serving() as server:
            assert server.port
            with socket.create_connection(("127.0.0.1", server.port)) as lazy:
                lazy.sendall(get("/big"))
                deadline = time.monotonic() + 10
                while True:
                    try:
                        assert (await exchange(server.port, get("/health")))[0] == 503
                        break
                    except (OSError, ValueError):
                        assert time.monotonic() < deadline, "the place was never given back"
                        await asyncio.sleep(0.02)

    asyncio.run(main())


def test_more_connections_than_the_limit_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)

    async def main() -> None:
        async with serving() as server:
            assert server.port
            idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 2) == b""
            writer.close()
            for reader, writer in idle:
                writer.write(get("/health"))
                assert (await reader.read()).startswith(b"HTTP/1.1 503")
                writer.close()
            assert (await exchange(server.port, get("/health")))[0] == 503

    asyncio.run(main())


def test_close_ends_open_connections_and_frees_the_port() -> None:
    async def main() -> None:
        async with serving() as server:
            port = server.port
            assert port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hea")
            reported: list[object] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
            await until(lambda: server._connections)
            await server.close()
            assert server.port is None
            await asyncio.sleep(0)
            assert reported == []
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 2) == b""
            writer.close()
            async with serving(f"127.0.0.1:{port}") as second:
                assert second.port == port

    asyncio.run(main())


@pytest.mark.parametrize("bind", ["127.0.0.1:{}", ":{}"])
def test_a_port_in_use_is_an_event_and_is_tried_again(bind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with socket.create_server(("", 0)) as occupant:
            port = occupant.getsockname()[1]
            server = HttpServer("health", bind.format(port), ROUTES, bind_retry_s=0.02)
            with caplog.at_level(logging.INFO):
                await server.start()
                assert server.port is None
                (record,) = caplog.records
                fields = record.__dict__["fields"]
                assert record.levelno == logging.ERROR
                assert fields["endpoint"] == "health" and str(port) in fields["bind"]
                assert "in use" in fields["error"].lower() and fields["retry_in_s"] == 0.02
                await asyncio.sleep(0.1)
                assert server.port is None and len(caplog.records) == 1
        try:
            await until(lambda: server.port)
            assert server.port == port
            assert (await exchange(port, get("/health")))[0] == 503
        finally:
            await server.close()

    asyncio.run(main())


def test_close_while_still_waiting_for_the_port() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as occupant:
            async with serving(f"127.0.0.1:{occupant.getsockname()[1]}"):
                pass
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_without_a_host_it_listens_on_ipv4_and_ipv6() -> None:
    async def main() -> None:
        async with serving(":0") as server:
            assert server.port
            assert (await exchange(server.port, get("/health")))[0] == 503
            if socket.has_dualstack_ipv6():
                assert (await exchange(server.port, get("/health"), "::1"))[0] == 503

    asyncio.run(main())


@pytest.mark.parametrize("bind", ["", "3010", "host", "::1:80", "host:http", "host:99999"])
def test_a_bind_that_makes_no_sense_is_refused(bind: str) -> None:
    with pytest.raises(ValueError):
        HttpServer("x", bind, ROUTES)
