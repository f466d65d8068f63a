"""What a person does where no node can know what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim import catchup
from tests.sim.reference import Violation

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World


def declare_one_complete(world: World) -> None:
    """All nodes wait for a snapshot, as none can tell that it misses nothing; those that do not are told so."""
    complete = [node for node in world.living() if not node.listens_only and _has_all(node)]
    if not complete:
        raise Violation("I3: all nodes wait for a snapshot, and none of them has all that the log holds")
    for node in complete:
        for shard in range(len(world.server.streams)):
            if not catchup.goes_on(node, shard):
                catchup.refill(node, shard)


def _has_all(node: Node) -> bool:
    """Whether it had read what the log says, as far as the log is gone."""
    server = node.world.server
    for shard, first in enumerate(server.firsts):
        position = catchup.position_of(node, shard)
        if position is None or position.sequence < first - 1:
            return False
        if position.stored_ns not in (0, server.position(shard, position.sequence).stored_ns):
            return False
    return True
