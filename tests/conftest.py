"""What no test may leave behind for the next one in its process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Whoever starts a daemon or a command in the test's own process sets up its log."""
    loggers = [logging.getLogger(name) for name in (None, "harmonylite", "harmonylite.stream", "nats", "asyncio")]
    before = [(one, list(one.handlers), one.level) for one in loggers]
    yield
    for one, handlers, level in before:
        one.handlers[:] = handlers
        one.setLevel(level)
