"""Rules of the engine, each broken on purpose: the simulation must notice. `python -m tests.sim.mutations` says how."""

from __future__ import annotations

import sys

from tests.sim.breaking import Edit, Mutation, catch
from tests.sim.history import History, Insert, Sync, Wait, Write
from tests.sim.regressions import BASE_THAT_NOBODY_ELSE_HAS, SAME_VERSION_IN_THE_LOG, SAME_VERSION_TWICE

_COMPARED = "(excluded.ts, excluded.node, excluded.rank) > (v.ts, v.node, v.rank)"
_APPLY = "harmonylite.db.replica:Replica._apply"
_DELIVER = "harmonylite.db.applying:Applying.deliver"
_ABSORB = "harmonylite.db.versions:Absorb.of"
_FAST = "harmonylite.db.apply:_Statements.__init__"
_JUDGE = "harmonylite.db.resolve:Resolver._judge"
_PLACE = "harmonylite.db.resolve:Resolver._place"
_AROUND = "harmonylite.db.resolve:Resolver._write_around_clashes"
_CLASHING = ("two_unique", "pair_unique")
_DROPPABLE = ("partial_unique", "expression_unique")

# One group brings two rows, one older and one newer than a row that clashes with both: only that row must go.
_RIVAL_OF_TWO = History(
    nodes=3,
    tables=("two_unique",),
    steps=(
        Write(0, (Insert("two_unique", ("p",), (("email", "a"),)),)),
        Wait(10),
        Write(1, (Insert("two_unique", ("r",), (("email", "a"), ("slot", 1))),)),
        Wait(10),
        Write(0, (Insert("two_unique", ("q",), (("slot", 1),)),)),
        Sync(0),
        Sync(1),
    ),
)

# A row arrives that loses to one of two rows and would have beaten the other: nothing happens to that other.
_BETWEEN_TWO_RIVALS = History(
    nodes=3,
    tables=("two_unique",),
    steps=(
        Write(1, (Insert("two_unique", ("r",), (("slot", 1),)),)),
        Wait(10),
        Write(0, (Insert("two_unique", ("p",), (("email", "a"), ("slot", 1))),)),
        Wait(10),
        Write(1, (Insert("two_unique", ("q",), (("email", "a"),)),)),
        Sync(0),
        Sync(1),
    ),
)

MUTATIONS: tuple[Mutation, ...] = (
    # who wins
    Mutation(
        "I5: the last writer wins, not the last to arrive",
        (Edit(_FAST, _COMPARED, "true"), Edit(_JUDGE, "if row.version > local.version:", "if True:")),
    ),
    Mutation(
        "I5: of equal timestamps the higher node id wins",
        (
            Edit(_FAST, _COMPARED, "excluded.ts > v.ts"),
            Edit(_JUDGE, "if row.version > local.version:", "if row.version.ts > local.version.ts:"),
        ),
    ),
    Mutation(
        "I5: a version is the time of writing, not of absorbing",
        (
            Edit(_ABSORB, 'logged = "l.ts', 'logged = capture.NOW_MS + " + 0 * "  "(l.ts'),
            Edit(_ABSORB, "0 END", "0 END)"),
        ),
    ),
    Mutation(
        "I6: a write beats the version its node had seen: current ts + 1",
        (Edit(_ABSORB, "ts = max(excluded.ts, ts + 1)", "ts = excluded.ts"),),
    ),
    Mutation(
        "a node's own floor keeps its writes in order when its clock steps back",
        (Edit(_ABSORB, "max({newest}, :floor)", "{newest}"),),
        profile="wild",
    ),
    Mutation(
        "the floor is never made of other nodes' timestamps",
        (
            Edit(
                _DELIVER,
                "newest.append(newest_ms(item.group))",
                "newest.append(newest_ms(item.group)); self._database.raise_floor(newest_ms(item.group))",
            ),
        ),
        profile="skewed",
    ),
    Mutation(
        "what was written before the server's time is known keeps its time",
        (
            Edit(
                "harmonylite.db.replica:Replica._clamp",
                "if not self._absorb(bound_ms, correction)[1]:",
                "self._database.raise_floor(server_ms)\n        if not self._absorb(bound_ms, correction)[1]:",
            ),
        ),
        profile="honest",
    ),
    Mutation(
        "receivers bound a version by the stream's own time",
        (
            Edit("harmonylite.db.resolve:Resolver._row", "min(ts, self._limit_ms)", "ts"),
            Edit("harmonylite.db.apply:Applier._compare", "max(times) > limit_ms or ", ""),
        ),
        profile="wild",
    ),
    Mutation(
        "a sender adopts the bounded version when it reads its own message",
        (
            Edit(
                _JUDGE,
                "store.set_version(self._connection, table, row.key, replace(local, version=row.version))",
                "pass",
            ),
        ),
        profile="wild",
    ),
    Mutation(
        "the floor is bounded with the versions that made it: no version is given out twice",
        (
            Edit(
                _DELIVER,
                "if item.group.publisher == self._settings.node_id and newest[-1] > limit:",
                "if False:",
            ),
        ),
        first=(SAME_VERSION_TWICE, SAME_VERSION_IN_THE_LOG),
    ),
    Mutation(
        "no message is skipped because this node sent it",
        (
            Edit(
                _DELIVER,
                "self.take(item.group, context, limit, careful=careful)",
                "item.group.publisher == self._settings.node_id"
                " or self.take(item.group, context, limit, careful=careful)",
            ),
        ),
        profile="wild",
    ),
    Mutation(
        "a tombstone is kept: an older write must not bring the row back",
        (
            Edit(
                _APPLY,
                "self._finish(context)",
                "[self._writer.execute(f'DELETE FROM \"__harmonylite__{t.name}_version\" WHERE deleted = 1')"
                " for t in self.schema.tables.values()]; self._finish(context)",
            ),
        ),
    ),
    Mutation(
        "tombstones that were never published are not pruned",
        (
            Edit("harmonylite.db.versions:settle_tombstones", "(batch IS NULL OR batch <= ?)", "?2 IS NOT NULL"),
            Edit("harmonylite.db.versions:prune_tombstones", "(batch IS NULL OR batch <= ?)", "?2 IS NOT NULL"),
            # so that a deletion waits long enough
            Edit("tests.sim.node:Node.publish", "if not lost:", "if not lost and self.world.step_number % 3:"),
        ),
        profile="forgetful",
    ),
    # capture
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
        (
            Edit(
                "harmonylite.db.evictions:stamp_unversioned", "if not integer(connection, statements.surplus):", "if 1:"
            ),
        ),
        tables=_DROPPABLE,
    ),
    Mutation(
        "also those that were removed while the daemon did not run",
        (
            Edit(
                "harmonylite.db.install:_absorb_leftovers",
                "if all(",
                "if False and all(",
            ),
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
                "harmonylite.db.replica:Replica.outgoing",
                "and not (self._settings.publish and self._absorber.has_log(connection))",
                "",
            ),
        ),
    ),
    Mutation(
        "I7: groups are cut only between joined batches",
        (Edit("harmonylite.db.outbox:Outbox._spans", "if lo and batch > joined_to:", "if lo:"),),
    ),
    Mutation(
        "I7: batches are joined when a pending row changes again",
        (Edit("harmonylite.db.versions:Absorber.absorb", "if lows:", "if False:"),),
    ),
    Mutation(
        "I3: a change stays pending until it is acknowledged",
        (
            Edit(
                "tests.sim.node:Node.publish",
                "if not lost:",
                "self.call(Replica.mark_published, group.through)\n        if not lost:",
            ),
        ),
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
    ),
    # applying
    Mutation(
        "apply absorbs before it compares",
        (Edit(_APPLY, "not self._absorb(bound_ms, correction)[1]", "False"),),
    ),
    Mutation(
        "I3: the position is stored in the transaction of the changes, not before",
        (
            Edit(
                _APPLY,
                "stream = delivery.position.stream",
                "stream = delivery.position.stream\n    with self._database.transaction():\n"
                "        tables.save_position(self._writer, delivery.position)",
            ),
        ),
    ),
    Mutation(
        "I3: the position is stored in the transaction of the changes, not never",
        (Edit(_APPLY, "tables.save_position(self._writer, delivery.position)", "pass"),),
    ),
    Mutation(
        "I8: the application's triggers do not run on the receiver",
        (
            Edit(
                "harmonylite.db.sql:open_writer",
                "SQLITE_DBCONFIG_ENABLE_TRIGGER, 0",
                "SQLITE_DBCONFIG_ENABLE_TRIGGER, 1",
            ),
            Edit(
                "harmonylite.db.side_triggers:_require_triggers_off",
                "if connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, -1):",
                "if False:",
            ),
        ),
        tables=("counted",),
    ),
    Mutation(
        "I8: triggers that keep an index in a table of their own are re-created",
        (
            Edit(
                "harmonylite.db.replica:Replica._follow_schema",
                "side_triggers.install(self._writer, frozenset(t.name for t in schema.tables.values()))",
                "pass",
            ),
        ),
        tables=("document",),
    ),
    Mutation(
        "foreign keys are off on the receiver: cascades arrive as rows",
        (Edit("harmonylite.db.sql:open_writer", "PRAGMA foreign_keys=OFF", "PRAGMA foreign_keys=ON"),),
        tables=("parent", "child"),
    ),
    Mutation(
        "an update sets the key columns too: NOCASE keys, 1 and 1.0",
        (
            Edit(
                "harmonylite.db.apply:_Statements.write",
                "if normal(name) not in same",
                "if name not in table.key_names",
            ),
            Edit(
                "harmonylite.db.rows:update",
                "for name, value in values.items())",
                "for name, value in values.items() if name not in table.key_names)",
            ),
            Edit(
                "harmonylite.db.rows:update",
                "*bound(list(values.values()))",
                "*bound([value for name, value in values.items() if name not in table.key_names])",
            ),
        ),
        tables=("order", "any_key"),
    ),
    # unique clashes
    Mutation(
        "a row that loses to one rival touches no other",
        (
            Edit(
                _PLACE,
                "self._lose(table, winner, strongest.version)\n",
                "self._lose(table, winner, strongest.version)\n"
                "        [self._bury(table, k, r, winner.row.version) for k, r in rivals"
                " if clash.order(r.version, k) < mine]\n",
            ),
        ),
        tables=("two_unique",),
        first=(_BETWEEN_TWO_RIVALS,),
    ),
    Mutation(
        "an incoming row must beat its rivals, or it loses",
        (Edit(_PLACE, "if any(clash.order(rival.version, key) > mine for key, rival in rivals):", "if False:"),),
        tables=_CLASHING,
    ),
    Mutation(
        "the loser of a clash gets the same tombstone everywhere: its own version, rank 1",
        (
            Edit(
                "harmonylite.db.resolve:Resolver._entomb",
                "version._replace(rank=1)",
                "Version(version.ts + 1, self._context.batch, 0)",
            ),
        ),
        tables=_CLASHING,
    ),
    Mutation(
        "clash tombstones are published",
        (Edit("harmonylite.db.resolve:Context.pending", "if not self.publish:", "if True:"),),
        tables=_CLASHING,
    ),
    Mutation(
        "the winners of a group are written newest first",
        (Edit(_AROUND, "reverse=True", "reverse=False"),),
        tables=_CLASHING,
        first=(_RIVAL_OF_TWO,),
    ),
    Mutation(
        "old rows are taken out first, so that unique values can be swapped",
        (
            Edit(
                _AROUND,
                "if winner.old is not None:",
                "if winner.old is not None and winner.row.values is None:",
            ),
        ),
        tables=_CLASHING,
    ),
    # the conflict log
    Mutation(
        "I10: a row here that a concurrent write replaced is recorded",
        (Edit("harmonylite.db.resolve:Resolver._log_discarded", "winner.discards is not None", "False"),),
    ),
    Mutation(
        "I10: a base is bounded with the version that it names",
        (Edit(_JUDGE, "if row.stamped[:2] == local.base and row.version != row.stamped:", "if False:"),),
        first=(BASE_THAT_NOBODY_ELSE_HAS,),
    ),
    Mutation(
        "I10: concurrency is judged by what the writer had seen, not by what it wrote before",
        (Edit(_ABSORB, "{_SEEN_BASE}", "base_ts = ts, base_node = node"),),
    ),
)


def main() -> int:
    """Prints every rule with the property that caught its absence."""
    missed = 0
    for mutation in MUTATIONS:
        caught = catch(mutation)
        missed += caught is None
        noticed = f"history {caught.histories}: {caught.failure.error}" if caught else "NOT NOTICED"
        print(f"{mutation.rule}\n    {noticed[:150]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
