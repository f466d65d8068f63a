"""Groups that are larger than their stream."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.limits import limited

_HISTORIES = tuple(map(limited, range(40)))

MUTATIONS = (
    Mutation(
        "what a stream can hold does not wait for what it cannot hold",
        (Edit("harmonylite.db.held:hold", "HELD + batch", "batch"),),
        first=_HISTORIES,
    ),
    Mutation(
        "joined batches that do not fit together are cut",
        (Edit("harmonylite.db.outbox:Outbox._is_alone", "return is_held(batch) or", "return False and"),),
        first=_HISTORIES,
    ),
    Mutation(
        "what was held is not pending once the stream has it",
        (Edit("harmonylite.db.held:release", "(published, batch, left)", "(batch - HELD, batch, left)"),),
        first=_HISTORIES,
    ),
)
