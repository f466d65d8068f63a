"""The log: one line an event, fields as data, no secrets, the journal's levels."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest

from harmonylite.observe.log import MASK, Repeated, is_secret, redact, rfc3339, setup

log = logging.getLogger("harmonylite.test_observe_log")


def console(*, verbose: bool = False) -> io.StringIO:
    stream = io.StringIO()
    setup(verbose=verbose, format="console", stream=stream)
    return stream


def json_events(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_console_line_has_time_level_message_and_fields() -> None:
    stream = console()
    log.warning("nats-server exited", extra={"fields": {"code": 1, "restart_in_s": 2.0, "path": Path("/x")}})
    line = stream.getvalue()
    found = re.fullmatch(
        r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) WARNING nats-server exited code=1 restart_in_s=2.0 path=/x\n", line
    )
    assert found, line
    assert abs((datetime.now() - datetime.fromisoformat(found[1])).total_seconds()) < 60


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("Zürich", "Zürich"),
        ("line\nbreak", r'"line\nbreak"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("\x7f", r'"\x7f"'),
        (None, "null"),
        (True, "true"),
        (0.1 + 0.2, "0.3"),
        (["a", "b"], "a,b"),
        (["a b", 1], '"a b,1"'),
        ({"k": 1}, r'"{\"k\": 1}"'),
        (float("inf"), "inf"),
        (OSError(28, "No space left on device"), '"[Errno 28] No space left on device"'),
    ],
)
def test_console_quotes_a_value_only_when_needed(value: object, shown: str) -> None:
    stream = console()
    log.info("event", extra={"fields": {"x": value}})
    assert stream.getvalue().endswith(f"INFO event x={shown}\n")


def test_data_cannot_forge_a_second_line() -> None:
    stream = console()
    log.info("from the net: %s", "a\n2024-01-01 ERROR gone\r\x1b[2J")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_json_is_one_flat_object_a_line() -> None:
    stream = io.StringIO()
    setup(verbose=False, format="json", stream=stream)
    log.error("apply failed\nreally", extra={"fields": {"table": "Zürich", "rows": 3, "lag": float("nan"), "level": 7}})
    log.info("no fields")
    first, second = json_events(stream)
    assert {name: first[name] for name in first if name != "time"} == {
        "level": "error",
        "logger": "harmonylite.test_observe_log",
        "message": "apply failed\nreally",
        "table": "Zürich",
        "rows": 3,
        "lag": "nan",
        "level_": 7,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(first["time"]))
    assert set(second) == {"time", "level", "logger", "message"}


def test_json_carries_the_traceback() -> None:
    stream = io.StringIO()
    setup(verbose=False, format="json", stream=stream)
    try:
        raise ValueError("bad nats://joe:hush@host")
    except ValueError:
        log.exception("it broke")
    (event,) = json_events(stream)
    assert "Traceback" in str(event["exception"]) and "ValueError: bad" in str(event["exception"])
    assert "hush" not in stream.getvalue()


@pytest.mark.parametrize("format", ["console", "json"])
def test_secrets_are_masked(format: str) -> None:
    stream = io.StringIO()
    setup(verbose=False, format=format, stream=stream)  # type: ignore[arg-type]
    fields = {
        "user_password": "hush1",
        "secret": "hush2",
        "session_token": "hush3",
        "access_key": "hush4",
        "seed": "hush5",
        "s3": {"secret": "hush6", "bucket": "shown1"},
        "url": "nats://joe:hush7@host:4222",
        "urls": ["nats://shown2:1,nats://joe:hush8@b:2"],
        "error": OSError("cannot reach tls://hush9@host"),
        "seed_file": "/etc/shown3",
    }
    log.warning("connecting to %s", "nats://u:hush10@shown4", extra={"fields": fields})
    text = stream.getvalue()
    assert "hush" not in text
    assert text.count(MASK) == 10
    assert [f"shown{n}" in text for n in (1, 2, 3, 4)] == [True] * 4


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://host:4222", "nats://host:4222"),
        ("nats://a:b@host", f"nats://{MASK}@host"),
        ("nats://a:p@ss/w@host", f"nats://{MASK}@host"),
        ("nats://h:1,tls://a:b@c,nats://x@y", f"nats://h:1,tls://{MASK}@c,nats://{MASK}@y"),
        ("mail joe@example.org", "mail joe@example.org"),
    ],
)
def test_redact_masks_only_userinfo(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_names_of_secrets() -> None:
    secret = ["password", "user_password", "PGPASSWD", "secret", "token", "seed", "access_key", "apikey", "nkey"]
    harmless = ["key", "rows", "seed_file", "password_file", "seeded", "table", "sequence"]
    assert [name for name in secret + harmless if is_secret(name)] == secret


def test_verbose_concerns_only_our_own_modules_and_setup_can_be_repeated() -> None:
    first = console()
    log.debug("quiet")
    log.info("said once")
    second = console(verbose=True)
    log.debug("debug now")
    logging.getLogger("nats.aio.client").info("chatter")
    logging.getLogger("asyncio").info("chatter")
    logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("nats.aio.client").warning("trouble")
    console(verbose=False)
    log.debug("quiet again")
    assert "said once" in first.getvalue() and first.getvalue().count("\n") == 1
    assert [line.split(" ", 3)[3] for line in second.getvalue().splitlines()] == ["debug now", "trouble"]


LOG_TO_STDERR = """
import logging, os, sys
state = os.fstat(2)
os.environ["JOURNAL_STREAM"] = sys.argv[1] or f"{state.st_dev}:{state.st_ino}"
from harmonylite.observe.log import setup
setup(verbose=True, format="console")
log = logging.getLogger("harmonylite.x")
for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
    log.log(level, "event", extra={"fields": {"n": level}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
"""


def log_in_child(journal_stream: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOG_TO_STDERR, journal_stream], stderr=subprocess.PIPE, text=True, check=True
    )
    return done.stderr.splitlines()


def test_under_the_journal_lines_have_a_priority_and_no_time() -> None:
    lines = log_in_child("")
    assert lines[:5] == ["<7>event n=10", "<6>event n=20", "<4>event n=30", "<3>event n=40", "<2>event n=50"]
    assert lines[5] == "<3>broke"
    assert lines[6].startswith("<3>Traceback") and all(line.startswith("<3>") for line in lines[5:])


def test_an_inherited_journal_stream_does_not_count() -> None:
    state = Path(os.devnull).stat()
    lines = log_in_child(f"{state.st_dev}:{state.st_ino}")
    assert re.match(r"\d{4}-\d\d-\d\d .* DEBUG event n=10", lines[0])


def test_rfc3339() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(1714744931.1234) == "2024-05-03T14:02:11.123Z"


def test_repeated_lets_one_through_per_interval_and_counts_the_rest() -> None:
    stream = console()
    times = iter((100.0, 101.0, 159.9, 160.0, 161.0, 500.0))
    event = Repeated(log, 60.0, clock=lambda: next(times))
    said = [event.warning("disk full", {"free": 0}) for _ in range(6)]
    assert said == [True, False, False, True, False, True]
    texts = [line.split("WARNING ")[1] for line in stream.getvalue().splitlines()]
    assert texts == ["disk full free=0", "disk full free=0 suppressed=2", "disk full free=0 suppressed=1"]


def test_repeated_after_reset_is_news_again() -> None:
    stream = console()
    event = Repeated(log, 60.0, clock=lambda: 1.0)
    assert event.error("x") and not event.error("x")
    event.reset()
    assert event.error("x")
    assert "suppressed" not in stream.getvalue()


def test_repeated_loses_no_count_between_threads() -> None:
    console()
    now = 0.0
    event = Repeated(log, 10.0, clock=lambda: now)
    threads = [threading.Thread(target=lambda: [event.warning("x") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream = console()
    now = 10.0
    event.warning("x")
    assert stream.getvalue().endswith("suppressed=1999\n")
