"""A node reads a stream: what comes next takes effect, exactly once, whatever comes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harmonylite.db.replica import Replica
from harmonylite.model import Delivery, ReceivedGroup
from tests.sim import catchup
from tests.sim.process import Crash
from tests.sim.reference import Violation, changes_of

if TYPE_CHECKING:
    from tests.sim.node import Node


def consume(node: Node) -> bool:
    """See Node.consume."""
    applied = [deliver(node, shard, 1_000_000) for shard in range(len(node.world.server.streams))]
    if catchup.at_the_end(node):
        node.call(lambda replica: replica.completeness.note_synced(node.world.server.now_ms))
    return any(applied)


def deliver(node: Node, shard: int, count: int, again: int = 0) -> bool:
    """See Node.deliver."""
    server = node.world.server
    if not node.online:
        return False
    if node.cursors[shard] + 1 < server.firsts[shard] and not catchup.bridge(node):
        node.disconnect()
        return False
    stream = server.streams[shard]
    before = server.firsts[shard] - 1
    cursor = max(node.cursors[shard], before)
    new = stream[cursor : cursor + count]
    old = stream[max(before, cursor - again) : cursor]
    received = old + [each for each in new if not _may_skip(node, shard, each)]
    end = cursor + len(new)
    if received:
        _apply(node, shard, received, end)
    elif new:
        node.call(Replica.note_position, server.position(shard, end))
        node.cursors[shard] = end
    node.read_back()
    return bool(received)


def _apply(node: Node, shard: int, received: Sequence[ReceivedGroup], end: int) -> None:
    position = node.world.server.position(shard, end)
    changes = [change for each in received for change in changes_of(each, node.world.tolerance_ms)]
    try:
        node.call(Replica.apply, Delivery(position, tuple(received)), node.bound_ms())
    except Crash:
        took_effect = node.observe().sequences.get(position.stream, 0) == end > node.cursors[shard]
        node.follow(changes if took_effect else ())
        raise
    node.cursors[shard] = end
    node.news.read(changes)
    node.follow(changes)
    if (stored := node.observe().sequences.get(position.stream)) != end:
        raise Violation(f"I3: node {node.id} applied up to {end}, its stored position is {stored}")


def _may_skip(node: Node, shard: int, received: ReceivedGroup) -> bool:
    """Whether a message is this session's own, with nothing in it that the stream's time bounds."""
    own = shard == node.index % node.world.history.shards and received.sequence in node.own
    changes = changes_of(received, node.world.tolerance_ms)
    return node.world.history.skip_own and own and all(each.effective == each.claimed for each in changes)
