"""Capturing and publishing (docs/rules.md, Capture and Publish)."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.history import (
    HOUR,
    Absence,
    Absorb,
    Collect,
    Connect,
    Delete,
    History,
    Publish,
    Race,
    Step,
    Sync,
    Update,
    Wait,
    Write,
)
from tests.sim.mutations.steps import row

_ABSORB = "harmonylite.db.versions:Absorb.of"
_CLASHING = ("two_unique", "pair_unique")
_DROPPABLE = ("partial_unique", "expression_unique")


def _history(*steps: Step, retention_ms: int | None = None) -> History:
    return History(nodes=3, tables=("counter",), steps=steps, group_rows=1, retention_ms=retention_ms)


# A row of a transaction is written again before both are published.
_WRITTEN_AGAIN = _history(Write(0, (row(1, "first"), row(2, "first"))), Absorb(0), Write(0, (row(2, "second"),)))

_NEVER_STORED = _history(Connect(0), Write(0, (row(1, "lost"),)), Collect(0), Publish(0, 1, "lost"))

# The application writes while groups are collected.
_WRITTEN_MEANWHILE = tuple(
    _history(
        Sync(1),
        Write(1, (row(1, "first"),)),
        Race(Sync(1), statement, Write(1, (row(1, "second"),))),
    )
    for statement in range(30)
)

# An edit is older than a deletion that was made, and forgotten, while its node was away.
_OLD_EDIT = _history(
    Write(0, (row(1, "known"),)),
    *map(Sync, (0, 1, 2)),
    Write(2, (Update("counter", (1,), (("note", "old"),)),)),
    Wait(1_000),
    Write(0, (Delete("counter", (1,)),)),
    Absence(2),
    retention_ms=10 * HOUR,
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "an UPDATE of the key logs the old key too",
        (Edit("harmonylite.db.capture:triggers", '_both(f"({changed})", _present(table, "OLD"))', '"false"'),),
    ),
    Mutation(
        "rows that REPLACE evicts through a unique constraint are logged",
        (Edit("harmonylite.db.capture:triggers", "if constraints:", "if False:"),),
        tables=_CLASHING,
    ),
    Mutation(
        "rows that REPLACE evicts through any other unique index are found when the write is absorbed",
        (Edit("harmonylite.db.evictions:Evictions.log", "if statements is None:", "if True:"),),
        tables=_DROPPABLE,
    ),
    Mutation(
        "also those that are older than the installation",
        (Edit("harmonylite.db.stamping:_stamp_few", "if size > left:", "if complete.add(table.name) is None:"),),
        tables=_DROPPABLE,
    ),
    Mutation(
        "also those that were removed while the daemon did not run",
        (
            Edit("harmonylite.db.install:_absorb_leftovers", "if all(", "if False and all("),
            # Else only where the schema changed in the same moment.
            Edit("harmonylite.db.install:install", "if moved or lost_logs", "if True or moved or lost_logs"),
        ),
        tables=_DROPPABLE,
    ),
    Mutation(
        "maybe evicted means deleted only if the row is gone",
        (Edit(_ABSORB, "HAVING min(l.op) < {MAYBE_EVICTED} OR {gone}", "HAVING true"),),
        tables=_CLASHING,
    ),
    Mutation(
        "NULL in a key is legal: such rows are not captured, and not refused",
        (Edit("harmonylite.db.capture:_present", "if part.nullable", "if False"),),
        tables=("text key", "composite"),
    ),
    # publishing
    Mutation(
        "a group holds no content newer than its versions",
        (
            Edit(
                "harmonylite.db.outgoing:Outgoing.read",
                "self._absorbing.has_log(connection)",
                "self._database.is_stale(connection)",
            ),
        ),
        first=_WRITTEN_MEANWHILE,
    ),
    Mutation(
        "I7: groups are cut only between joined batches",
        (Edit("harmonylite.db.outbox:Outbox._spans", "if lo and batch > joined_to:", "if lo:"),),
        first=(_WRITTEN_AGAIN,),
    ),
    Mutation(
        "I7: batches are joined when a pending row changes again",
        (Edit("harmonylite.db.versions:Absorber.absorb", "if lows:", "if False:"),),
        first=(_WRITTEN_AGAIN,),
    ),
    Mutation(
        "I3: a change stays pending until it is acknowledged",
        (
            Edit(
                "tests.sim.node:Node.publish",
                "if not lost:",
                "self.published(group.through)\n        if not lost:",
            ),
        ),
        first=(_NEVER_STORED,),
    ),
    Mutation(
        "after every connect: consume to the end, then publish",
        (
            Edit("tests.sim.node:Node.caught_up", "return all(", "return True or all("),
            Edit(
                "tests.sim.world:World._sync",
                "busy = node.consume()\n",
                'node.collect("reader")\n    busy = node.publish(1_000_000)\n    busy = node.consume() or busy\n',
            ),
        ),
        profile="forgetful",
        first=(_OLD_EDIT,),
    ),
)
