"""Which version a write gets, and which of two wins (docs/rules.md, Versions and Clocks)."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.regressions import SAME_VERSION_IN_THE_LOG, SAME_VERSION_TWICE

_COMPARED = "(excluded.ts, excluded.node, excluded.rank) > (v.ts, v.node, v.rank)"
_APPLY = "harmonylite.db.replica:Replica._apply"
_DELIVER = "harmonylite.db.applying:Applying.deliver"
_ABSORB = "harmonylite.db.versions:Absorb.of"
_FAST = "harmonylite.db.apply:_Statements.__init__"
_JUDGE = "harmonylite.db.resolve:Resolver._judge"

MUTATIONS: tuple[Mutation, ...] = (
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
                "harmonylite.db.retime:Times.server_time",
                "self._absorbing.before(",
                "with self._database.transaction():\n        self._database.raise_floor(server_ms)\n"
                "    self._absorbing.before(",
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
)
