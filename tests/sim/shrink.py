"""Makes a failing history smaller while it keeps failing: fewer steps, fewer statements, plainer settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.sim.history import History, Interrupt, Race, Write

T = TypeVar("T")


def shrink(history: History, fails: Callable[[History], bool], seconds: float) -> History:
    """The smallest failing history found within `seconds`; at worst `history` itself."""
    deadline = time.monotonic() + seconds
    improved = True
    while improved:
        improved = False
        for candidate in _smaller(history):
            if time.monotonic() > deadline:
                return history
            if fails(candidate):
                history, improved = candidate, True
                break
    return history


def _smaller(history: History) -> Iterator[History]:
    """Simpler histories, the boldest cuts first."""
    for steps in _without_parts(history.steps):
        yield replace(history, steps=steps)
    if history.seed_rows:
        yield replace(history, seed_rows=())
    for seeds in _without_parts(history.seed_rows):
        yield replace(history, seed_rows=seeds)
    for own_seeds in _without_parts(history.own_seeds):
        yield replace(history, own_seeds=own_seeds)
    if any(history.offsets):
        yield replace(history, offsets=(0,) * history.nodes)
    plain = {"shards": 1, "listeners": 0, "group_rows": 512, "time_known": True, "skip_own": False}
    for name, value in plain.items():
        if getattr(history, name) != value:
            yield replace(history, **{name: value})  # type: ignore[arg-type]
    for place, step in enumerate(history.steps):
        write = step.write if isinstance(step, Race) else step
        if isinstance(step, (Race, Interrupt)):
            yield _with_step(history, place, step.step)
        if isinstance(write, Write):
            for operations in _without_parts(write.operations):
                if operations:
                    smaller = replace(write, operations=operations)
                    step_now = replace(step, write=smaller) if isinstance(step, Race) else smaller
                    yield _with_step(history, place, step_now)


def _with_step(history: History, place: int, step: object) -> History:
    steps = (*history.steps[:place], step, *history.steps[place + 1 :])
    return replace(history, steps=steps)  # type: ignore[arg-type]


def _without_parts(items: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """`items` without halves, then quarters, down to single ones."""
    size = len(items) // 2
    while size:
        for start in range(0, len(items), size):
            yield (*items[:start], *items[start + size :])
        size //= 2
    if len(items) == 1:
        yield ()
