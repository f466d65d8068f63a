"""A log that lost what it had acknowledged is noticed, and filled again (docs/rules.md, Catching up)."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.history import (
    Collect,
    Connect,
    Delete,
    Disconnect,
    History,
    Interrupt,
    Lose,
    Operation,
    Perish,
    Publish,
    Step,
    Sync,
    Trim,
    Update,
    Write,
)
from tests.sim.mutations.steps import row
from tests.sim.regressions import LOST_AND_TRIMMED_TO_THE_POSITION, PUBLISHED_AFTER_THE_SNAPSHOT_AND_LOST

_MARK = "harmonylite.db.marking:Marking._mark"
_GAP = "harmonylite.stream.lineage:compare_lineage"
_VERSIONED = "AND (ts > 0 OR rank > 0)"


def _history(*steps: Step, before: tuple[Operation, ...] = (), skip_own: bool = True) -> History:
    """Three nodes with right clocks, that all have the rows that `before` made."""
    opening = (Write(0, before), Sync(0), Sync(1), Sync(2)) if before else ()
    return History(nodes=3, tables=("counter",), steps=(*opening, *steps), skip_own=skip_own)


# Only its writer has the row.
_UNREAD = _history(Write(0, (row(1, "lost"),)), Sync(0), Lose(1))

# The writer is gone, one other node has what the log lost.
_RELAYED = _history(Write(0, (row(1, "lost"),)), Sync(0), Sync(1), Perish(0), Lose(1))
_RELAYED_DELETE = _history(
    Write(0, (Delete("counter", (1,)),)), Sync(0), Sync(1), Perish(0), Lose(1), before=(row(1, "deleted"),)
)

# Another node's message has the sequence number of the lost one when the others come back.
_SAME_NUMBER = _history(
    Write(0, (row(1, "lost"),)), Sync(0), Sync(1), Lose(1), Write(2, (row(2, "in its place"),)), Sync(2)
)

# And that is discarded, too; what came next is the first that is left.
_GONE = _history(
    Disconnect(1),
    Lose(1),
    Write(2, (row(2, "in its place"),)),
    Sync(2),
    Sync(0),
    Trim(0, 0),
    Write(2, (row(3, "next"),)),
    Sync(2),
    Sync(1),
    before=(row(1, "known"),),
)

# One of two nodes that have it publishes it; the other one must see that.
_PUBLISHED_ONCE = _history(Write(0, (row(1, "lost"),)), Sync(0), Sync(1), Lose(1), Sync(0), Sync(1))

_DELETED_ONCE = _history(
    Write(0, (Delete("counter", (1,)),)), Sync(0), Sync(1), Lose(1), Sync(0), Sync(1), before=(row(1, "deleted"),)
)

# One of three writes over it instead.
_WRITTEN_OVER = _history(
    Lose(1), Write(2, (Update("counter", (1,), (("note", "newer"),)),)), Sync(2), Sync(1), before=(row(1, "lost"),)
)

# Killed when it has marked some of its rows.
_KILLED = tuple(
    _history(
        Write(0, tuple(row(key, "lost") for key in (1, 2, 3, -1, 2**63 - 1))),
        Sync(0),
        Lose(1),
        Interrupt(Sync(0), statement),
    )
    for statement in range(5, 40, 2)
)

# A snapshot of the log as it is now does not have what node 1 had read from the log as it was.
_AFTER = (Write(2, (row(2, "later"),)), Sync(2), Write(2, (row(3, "later"),)), Sync(2))
UNKNOWN_THERE = _history(
    Write(0, (row(1, "lost"),)), Sync(0), Sync(1), Disconnect(2), Perish(0), Lose(1), *_AFTER, Trim(2, 0)
)
NEWER_HERE = _history(
    Write(0, (row(1, "lost"),)),
    Sync(0),
    Sync(1),
    Perish(0),
    Lose(1),
    *_AFTER,
    Trim(2, 0),
    before=(row(1, "old"),),
)

DELETED_HERE = _history(
    Write(0, (Delete("counter", (1,)),)),
    Sync(0),
    Sync(1),
    Perish(0),
    Lose(1),
    *_AFTER,
    Trim(2, 0),
    before=(row(1, "old"),),
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "lineage: a stream that ends before the position has lost its tail",
        (Edit(_GAP, "if state.last_seq < position.sequence:", "if False:"),),
        first=(_UNREAD,),
    ),
    Mutation(
        "lineage: of a message at the same sequence number the time tells whether it is another one",
        (Edit(_GAP, "if found_ns != position.stored_ns:", "if False:"),),
        first=(_SAME_NUMBER,),
    ),
    Mutation(
        "lineage: nothing tells that of a message that is gone",
        (Edit(_GAP, "if _is_just_gone(state, position):", "if False:"),),
        first=(_GONE,),
    ),
    Mutation(
        "lineage: but of the last one, which was discarded without another after it",
        (Edit(_GAP, "found_ns = state.last_ns", "found_ns = position.stored_ns"),),
        first=(LOST_AND_TRIMMED_TO_THE_POSITION,),
    ),
    Mutation(
        "I3: a group counts as published once its node has read it back, not when it is acknowledged",
        (
            Edit(
                "tests.sim.node:Node._acknowledge",
                "self._unread.append((group, sequence))",
                "self.published(group.through)",
            ),
        ),
        first=(_history(Connect(0), Write(0, (row(1, "lost"),)), Collect(0), Publish(0, 1), Lose(1)),),
    ),
    Mutation(
        "I3: the gap test begins at the last position, though it is not stored yet",
        (Edit("tests.sim.catchup:position_of", "node.call(Replica.flush)", "pass"),),
        first=(_UNREAD,),
    ),
    Mutation(
        "I3: what the log lost is published again",
        (Edit(_MARK, _VERSIONED, "AND false"),),
        first=(_UNREAD,),
    ),
    Mutation(
        "I3: so is what the snapshot's node had not published, and the log lost since",
        (Edit("harmonylite.db.difference:marking", " OR {same})", ")"),),
        first=(PUBLISHED_AFTER_THE_SNAPSHOT_AND_LOST,),
    ),
    Mutation(
        "I3: rows of all origins are published again, by every node that has them",
        (
            Edit(
                _MARK,
                _VERSIONED,
                "AND node = (SELECT value FROM __harmonylite__meta WHERE name = 'node_id')",
            ),
        ),
        first=(_RELAYED,),
    ),
    Mutation(
        "I3: tombstones that the log lost are published again",
        (Edit(_MARK, _VERSIONED, "AND ts > 0 AND NOT deleted"),),
        first=(_RELAYED_DELETE,),
    ),
    Mutation(
        "what the log lost is published again at the version that it had",
        (Edit(_MARK, "SET batch =", "SET ts = ts + 1, batch ="),),
        first=(_UNREAD,),
    ),
    Mutation(
        "a log that lost messages is read from its first one",
        (
            Edit(
                "harmonylite.db.marking:Marking.finish",
                "move_position(position)",
                "move_position(Position(position.stream, position.created, position.sequence + 1, 0))",
            ),
        ),
        first=(_SAME_NUMBER,),
    ),
    Mutation(
        "the position moves last: who is killed while marking marks the rest",
        (
            Edit(
                "tests.sim.catchup:refill",
                "marks = ",
                "node.call(Replica.move_position, position); marks = ",
            ),
        ),
        first=_KILLED,
    ),
    Mutation(
        "a mark is dropped when that version is read from the log",
        (Edit("harmonylite.db.resolve:Resolver._judge_twins", "if local.batch is not None and", "if False and"),),
        first=(_PUBLISHED_ONCE,),
    ),
    Mutation(
        "also that of a tombstone",
        (Edit("harmonylite.db.apply:Applier._check_old", "(batch or 0) <= published", "True"),),
        first=(_DELETED_ONCE,),
    ),
    Mutation(
        "a mark is dropped when a newer version is read from the log",
        (
            Edit("harmonylite.db.apply:_Statements.__init__", '" batch = NULL,', '" batch = v.batch,'),
            Edit(
                "harmonylite.db.resolve:Resolver._settle",
                "VersionRow(row.version, deleted, None, row.base)",
                "VersionRow(row.version, deleted, local.batch, row.base)",
            ),
        ),
        first=(_WRITTEN_OVER,),
    ),
)
