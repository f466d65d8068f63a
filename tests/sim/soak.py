"""Random histories for as long as told: `python -m tests.sim.soak --seconds 3600 [--seed 1]`.

A failure prints its seed and the smallest history that still fails, as Python that `--replay FILE` runs again.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

from harmonylite.model import RawText
from tests.sim import history as history_module
from tests.sim.generator import generate
from tests.sim.history import History
from tests.sim.shrink import shrink
from tests.sim.world import HistoryFailed, World, run

PROGRESS_SECONDS = 10.0
SHRINK_SECONDS, TEST_SHRINK_SECONDS = 120.0, 30.0


def failure(history: History) -> HistoryFailed | None:
    """What is wrong with the engine according to `history`; None: nothing."""
    try:
        run(history)
    except HistoryFailed as failed:
        return failed
    return None


def smallest(failed: HistoryFailed, seconds: float = SHRINK_SECONDS) -> HistoryFailed:
    """The same kind of failure with as few steps as can be found."""
    kind = type(failed.error)

    def fails(candidate: History) -> bool:
        found = failure(candidate)
        return found is not None and type(found.error) is kind

    return failure(shrink(failed.history, fails, seconds)) or failed


def run_as_test(history: History, name: object) -> None:
    """AssertionError: `name`, and the failure with as few steps as can be found in half a minute."""
    try:
        run(history)
    except HistoryFailed as failed:
        raise AssertionError(f"{name}: {smallest(failed, TEST_SHRINK_SECONDS)}") from None


def report(failed: HistoryFailed, seed: int | None) -> None:
    """Everything needed to see the failure again."""
    print(f"\nFAILED{f' with seed {seed}' if seed is not None else ''}:", failed, sep="\n", flush=True)


def replay(path: Path) -> int:
    """Run the history in a file, as `report` prints it. Returns the exit code."""
    text = path.read_text()
    names = {**vars(history_module), "RawText": RawText, "inf": float("inf")}
    history = eval(text[text.index("History(") :], names)
    failed = failure(history)
    if failed is None:
        print("the history passes")
        return 0
    report(failed, None)
    return 1


class Totals:
    """What the soak has done so far."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts: Counter[str] = Counter()

    def add(self, world: World) -> None:
        self.counts["histories"] += 1
        self.counts["steps"] += world.step_number
        self.counts["row writes"] += len(world.writes)
        self.counts["groups"] += sum(len(stream) for stream in world.server.streams)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        return f"{time.monotonic() - self.started:.0f} s: {counts or 'nothing yet'}"


def soak(seconds: float, seed: int) -> int:
    """Histories of `seed`, `seed` + 1, ... until the time is up or one fails. Returns the exit code."""
    totals = Totals()
    shown = time.monotonic()
    print(f"random histories from seed {seed} for {seconds:.0f} s", flush=True)
    while time.monotonic() - totals.started < seconds:
        try:
            totals.add(run(generate(seed)))
        except HistoryFailed as failed:
            print(totals)
            report(smallest(failed), seed)
            return 1
        seed += 1
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            print(totals, flush=True)
    print(f"{totals}, no failure")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, help="the first seed (default: a random one)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the history in FILE instead")
    arguments = parser.parse_args()
    if arguments.replay:
        return replay(arguments.replay)
    return soak(arguments.seconds, arguments.seed if arguments.seed is not None else secrets.randbelow(2**40))


if __name__ == "__main__":
    sys.exit(main())
