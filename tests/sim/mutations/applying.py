"""What arrives takes effect (docs/rules.md, Apply)."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.history import History, Insert, Sync, Wait, Write

_APPLY = "harmonylite.db.replica:Replica._apply"
_ABSORB = "harmonylite.db.versions:Absorb.of"
_JUDGE = "harmonylite.db.resolve:Resolver._judge"
_PLACE = "harmonylite.db.resolve:Resolver._place"
_AROUND = "harmonylite.db.resolve:Resolver._write_around_clashes"
_CLASHING = ("two_unique", "pair_unique")

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
    Mutation(
        "apply absorbs before it compares",
        (Edit(_APPLY, "not self.absorbing.piece(bound_ms, correction).drained", "False"),),
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
        (Edit("harmonylite.db.context:Context.pending", "if not self.publish:", "if True:"),),
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
        "I10: concurrency is judged by what the writer had seen, not by what it wrote before",
        (Edit(_ABSORB, "{_SEEN_BASE}", "base_ts = ts, base_node = node"),),
    ),
)
