"""Histories in which the streams cannot hold larger groups for a while."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.sim.generator import generate
from tests.sim.history import History, Limit, Step


def limited(seed: int) -> History:
    """The random history of a seed, with a limit that begins somewhere in it and may change or end before it does."""
    source = random.Random(f"limits {seed}")
    history = generate(seed)
    steps: list[Step] = list(history.steps)
    first = source.randrange(1 + len(steps) // 2)
    for place in sorted((source.randint(first, len(steps)) for _ in range(source.randrange(3))), reverse=True):
        steps.insert(place, Limit(source.choice((None, 1, 2, 3, 5))))
    steps.insert(first, Limit(source.choice((1, 2, 3))))
    return replace(history, steps=tuple(steps))
