"""A daemon's process: calls of the engine that may be killed, or raced by the application, before any SQL statement."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import apsw

from harmonylite.db.replica import Replica
from tests.sim.application import Application
from tests.sim.history import Write

T = TypeVar("T")


class Crash(BaseException):
    """The daemon is killed here. Not an Exception: nothing in the engine may handle it."""


class Process:
    """`path`: the database's file. `dead`: killed, and not buried yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dead = False
        self._replica: Replica | None = None
        self._connections: list[apsw.Connection] = []
        self._countdown: int | None = None
        self._race: tuple[int, Write] | None = None

    application: Application

    def write(self, step: Write) -> None:
        """A transaction of the application. Raises apsw.BusyError while the engine holds the lock."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        return self._replica is not None

    def call(self, method: Callable[..., T], *arguments: object) -> T:
        """`method` of the engine, called with the replica."""
        assert self._replica is not None
        with self.engine():
            return method(self._replica, *arguments)

    @contextlib.contextmanager
    def engine(self) -> Iterator[None]:
        """Connections that are opened inside are the daemon's: traced, and on this node's clock."""
        apsw.connection_hooks.append(self._adopt)
        try:
            yield
        finally:
            apsw.connection_hooks.remove(self._adopt)

    def close_files(self) -> None:
        """What the kernel does for a killed process: its files are closed, open transactions are gone."""
        self._replica = None
        for connection in self._connections:
            connection.close(True)
        self._connections.clear()
        self.dead = False

    def _adopt(self, connection: apsw.Connection) -> None:
        self._connections.append(connection)
        self.application.set_clock(connection)
        connection.exec_trace = self._before_statement

    def _before_statement(self, cursor: object, sql: str, bindings: object) -> bool:
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown < 0:
                self.dead = True
                raise Crash
        if self._race is not None:
            remaining, write = self._race
            if remaining > 0:
                self._race = (remaining - 1, write)
            else:
                with contextlib.suppress(apsw.BusyError):
                    self._write_in_race(write)
        return True

    def _write_in_race(self, write: Write) -> None:
        self._race = None
        try:
            self.write(write)
        except apsw.BusyError:
            self._race = (0, write)
            raise

    @contextlib.contextmanager
    def dying_at(self, statement: int) -> Iterator[None]:
        """Inside, the engine is killed before its `statement`-th statement."""
        self._countdown = statement
        try:
            yield
        finally:
            self._countdown = None

    @contextlib.contextmanager
    def racing(self, statement: int, write: Write) -> Iterator[None]:
        """Inside, the application commits `write` before the engine's `statement`-th statement, or afterwards."""
        self._race = (statement, write)
        try:
            yield
        finally:
            race, self._race = self._race, None
        if race is not None:
            self.write(race[1])
