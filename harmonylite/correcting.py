"""What follows from the server's time, and from a step of the local clock, for what was written here before
(docs/rules.md, Clocks)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from harmonylite import clock
from harmonylite.clock import ServerClock, Step
from harmonylite.db.versions import Correction

if TYPE_CHECKING:
    from harmonylite.engine import Engine


class Correcting:
    """One per engine. The methods may be called at any time, also while another one runs: they take turns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()
        self._backlog_absorbed = False

    async def server_time(self, server_ms: int, round_trip_ms: float) -> None:
        """The server answered just now with its time: bound, correct, raise the floor."""
        engine = self._engine
        server = engine.time.heard(server_ms, round_trip_ms)
        async with self._turn:
            await self._absorb_backlog()
            # First: a clock that was just set agrees with the server, but what was written before does not.
            await self._correct_steps(server)
            await engine.write(lambda: self._believe(server))
            await engine.write(lambda: engine.replica.times.server_time(server_ms, engine.time.correction))

    async def check_clock(self) -> None:
        """Correct what was written before the wall clock was set."""
        async with self._turn:
            await self._absorb_backlog()
            await self._correct_steps(self._engine.time.server)

    async def _absorb_backlog(self) -> None:
        """Once, before the clock is judged: what was logged while the daemon was off may be of another boot, whose
        clock was another one. As versions, both are told apart; in the log, they are not."""
        if not self._backlog_absorbed:
            await self._engine.absorb_all()
            self._backlog_absorbed = True

    def _believe(self, server: ServerClock) -> None:
        """On the writer's thread, in one job: nothing is absorbed between the shift and what follows from it."""
        time, times = self._engine.time, self._engine.replica.times
        proposal = time.propose(server)
        if proposal.moved_ms:
            times.shift_clock(from_ms=time.boot_started_ms, to_ms=clock.wall_ms(), delta_ms=proposal.moved_ms)
        time.commit(proposal)

    async def _correct_steps(self, server: ServerClock) -> None:
        while (step := self._engine.time.check_step()) is not None:
            await self._engine.write(partial(self._correct_step, step, server))

    def _correct_step(self, step: Step, server: ServerClock) -> None:
        """On the writer's thread. Done again as a whole if it fails, or if nobody waits for it any more."""
        time, replica = self._engine.time, self._engine.replica
        if wrong := time.correction.delta_ms:
            replica.absorbing.before(lambda: None, time.bound_ms(), Correction(wrong, step.before_ms))
        elif time.is_trusted(server):
            replica.times.shift_clock(from_ms=time.boot_started_ms, to_ms=step.before_ms, delta_ms=step.delta_ms)
        time.stepped()
