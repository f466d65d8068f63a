"""Tombstones are forgotten after a while; who comes back later deletes what the others have forgotten."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.history import (
    HOUR,
    Absence,
    Delete,
    Disconnect,
    History,
    Lose,
    Operation,
    Perish,
    Prune,
    Race,
    SetClock,
    Step,
    Sync,
    Trim,
    Update,
    Wait,
    Write,
)
from tests.sim.mutations.steps import KNOWN, mail, row

_PRUNE = "harmonylite.db.replica:Replica.prune_tombstones"
_ARRIVE = "harmonylite.db.completeness:Completeness.arrive"
_PLAN = "harmonylite.db.merge:Merger._plan"
_SCANS = "harmonylite.db.merge:Merger._scans"
_DELETE = "harmonylite.db.reconcile:delete"
_RETENTION_MS = 10 * HOUR


def _history(
    *steps: Step,
    seeds: tuple[Operation, ...] = (),
    own_seeds: tuple[tuple[int, Operation], ...] = (),
    offsets: tuple[int, ...] = (),
    tables: tuple[str, ...] = ("counter",),
) -> History:
    return History(
        nodes=3,
        tables=tables,
        steps=steps,
        seed_rows=seeds,
        own_seeds=own_seeds,
        offsets=offsets,
        retention_ms=_RETENTION_MS,
    )


_DELETE_IT = Write(0, (Delete("counter", (1,)),))

# Node 2 forgets what it may; the log goes on without what node 1 would need, which merges a snapshot of node 2.
_FORGETS_AND_LEAVES_BEHIND: tuple[Step, ...] = (
    Prune(2),
    Write(2, (row(3, "later"),)),
    Sync(2),
    Write(2, (row(-1, "later"),)),
    Sync(2),
    Trim(2, 0),
    Sync(1),
)

# Node 1 has a row that the others have deleted, and forgotten that; and one that it has not published.
_FORGOTTEN = _history(*KNOWN, Disconnect(1), Write(1, (row(2, "waits"),)), _DELETE_IT, Sync(0), Absence(1, trim=True))
_FORGOTTEN_SEED = _history(*KNOWN, _DELETE_IT, Sync(0), Absence(1, trim=True), seeds=(row(1, "seed"), row(3, "seed")))
_SEED_ONLY = _history(
    Write(0, (row(2, "known"),)),
    Sync(0),
    Sync(1),
    Sync(2),
    _DELETE_IT,
    Sync(0),
    Absence(1, trim=True),
    seeds=(row(1, "seed"),),
)

# Node 1 comes for the first time, with a row of its own, and the others have forgotten something.
_FIRST_JOIN = _history(
    Write(0, (row(1, "known"),)),
    Sync(0),
    Sync(2),
    _DELETE_IT,
    Sync(0),
    Sync(2),
    Prune(0),
    Wait(11 * HOUR),
    Prune(0),
    Trim(0, 0),
    Sync(1),
    own_seeds=((1, row(5, "of node 1")),),
)

# Node 1 merges a snapshot of node 0, which has forgotten a deletion, and then takes one itself, which node 2 merges.
_SECOND_HAND = _history(
    *KNOWN,
    Disconnect(1),
    Disconnect(2),
    _DELETE_IT,
    Sync(0),
    Prune(0),
    Wait(11 * HOUR),
    Prune(0),
    Trim(0, 0),
    Sync(1),
    Trim(1, 0),
    Sync(2),
)

# A row is deleted by a node that is away for longer than the retention; another one was in step five hours ago.
_DELETED_OFFLINE = _history(
    *KNOWN,
    Disconnect(1),
    Write(1, (Delete("counter", (1,)),)),
    Wait(20 * HOUR),
    Sync(2),
    Disconnect(2),
    Wait(5 * HOUR),
    Sync(1),
    Sync(0),
    Prune(0),
    Trim(0, 0),
    Sync(2),
)

# Node 2, whose clock is a year ahead, forgets what it may, and takes a snapshot that lacks a row that the log has lost.
_YEAR_AHEAD = _history(
    *KNOWN,
    _DELETE_IT,
    Sync(0),
    Sync(1),
    Sync(2),
    Disconnect(2),
    Write(0, (row(2, "lost"),)),
    Sync(0),
    Sync(1),
    Perish(0),
    Lose(1),
    SetClock(2, 365 * 24 * HOUR),
    Sync(2),
    *_FORGETS_AND_LEAVES_BEHIND,
)

# The same, but it was long ago that node 1 read something, and a moment ago that it knew that there was nothing new.
_QUIET = _history(
    *KNOWN,
    _DELETE_IT,
    Sync(0),
    Sync(1),
    Sync(2),
    Prune(2),
    Disconnect(2),
    Write(0, (row(2, "lost"),)),
    Sync(0),
    Sync(1),
    Perish(0),
    Wait(11 * HOUR),
    Sync(1),
    Lose(1),
    Sync(2),
    *_FORGETS_AND_LEAVES_BEHIND,
)

# The application touches a row just before it would be deleted.
_TOUCHED = tuple(
    _history(
        *KNOWN,
        _DELETE_IT,
        Sync(0),
        Absence(1, trim=True),
        Race(Sync(1), statement, Write(1, (Update("counter", (1,), (("note", "touched"),)),))),
    )
    for statement in range(0, 80, 2)
)

# The log loses a deletion, which node 1 publishes again nine hours later; node 2 was in step just before that.
_AGAIN = _history(
    *KNOWN,
    Disconnect(2),
    _DELETE_IT,
    Sync(0),
    Sync(1),
    Prune(1),
    Perish(0),
    Lose(1),
    Wait(9 * HOUR),
    Sync(2),
    Disconnect(2),
    Sync(1),
    Prune(1),
    Write(1, (row(2, "later"),)),
    Sync(1),
    Wait(2 * HOUR),
    Prune(1),
    Trim(1, 0),
    Sync(2),
)

# The same with a snapshot that does not know of the deletion, and with node 3 in the place of node 2.
_AGAIN_AFTER_A_MERGE = History(
    nodes=4,
    tables=("counter",),
    retention_ms=_RETENTION_MS,
    steps=(
        *KNOWN,
        Sync(3),
        Disconnect(2),
        Disconnect(3),
        _DELETE_IT,
        Sync(0),
        Sync(1),
        Prune(1),
        Perish(0),
        Lose(1),
        Wait(9 * HOUR),
        Sync(3),
        Disconnect(3),
        Write(2, (row(2, "later"),)),
        Sync(2),
        Write(2, (row(3, "later"),)),
        Sync(2),
        Trim(2, 0),
        Sync(1),
        Prune(1),
        Write(1, (row(2, "last"),)),
        Sync(1),
        Wait(2 * HOUR),
        Prune(1),
        Trim(1, 0),
        Sync(3),
    ),
)

# The stale copy of a deleted row has the same unique value as a row that is alive, and a later version.
_STALE_COPY = _history(
    Write(1, (mail(1, "a"),)),
    Sync(1),
    Sync(0),
    Sync(2),
    Write(0, (Delete("one_unique", (1,)), mail(2, "a"))),
    Sync(0),
    Absence(1, trim=True),
    offsets=(0, 50_000, 0),
    tables=("one_unique",),
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "a row that the others have deleted and forgotten is deleted",
        (Edit(_PLAN, "known >= self._since_ms", "True"),),
        first=(_FORGOTTEN,),
    ),
    Mutation(
        "I10: what is deleted for that goes into the conflict log",
        (
            Edit(
                _DELETE,
                "context.recorder.conflict(table.name, each.key, local.version, None, FORGOTTEN, content)",
                "pass",
            ),
        ),
        first=(_FORGOTTEN,),
    ),
    Mutation(
        "I3: a row that was not published is never deleted for that",
        (
            Edit("harmonylite.db.difference:_local", "(v.batch IS NULL OR v.batch <= ?)", "?1 IS NOT NULL"),
            Edit(_DELETE, "or pending", ""),
        ),
        first=(_FORGOTTEN,),
    ),
    Mutation(
        "I3: nor is one that the application has just touched",
        (Edit(_DELETE, "local.version != each.version or pending or", ""),),
        first=_TOUCHED,
    ),
    Mutation(
        "a row without a version that the others have deleted and forgotten is deleted",
        (Edit(_SCANS, "if not self._first_join:", "if False:"),),
        first=(_SEED_ONLY, _FORGOTTEN_SEED),
    ),
    Mutation(
        "but not when its node joins for the first time",
        (Edit(_PLAN, "self._first_join = known == 0", "self._first_join = False"),),
        first=(_FIRST_JOIN,),
    ),
    Mutation(
        "forgotten rows go first, or a good row would lose a unique clash to one of them",
        (Edit(_SCANS, "for theirs, here in pairs:\n", "yield from takes\n    for theirs, here in pairs:\n"),),
        first=(_STALE_COPY,),
    ),
    Mutation(
        "forgetting moves the beginning of the window",
        (Edit(_PRUNE, "max(self._state.tombstones_since_ms, before)", "self._state.tombstones_since_ms"),),
        first=(_FORGOTTEN,),
    ),
    Mutation(
        "a node was in step when it last knew that it had read everything",
        (
            Edit(
                "harmonylite.db.database:Database.note_synced",
                "self._synced_ms = max(self._synced_ms, server_ms)",
                "pass",
            ),
        ),
        first=(_QUIET,),
    ),
    Mutation(
        "who merges a snapshot has the same window",
        (
            Edit(
                _ARRIVE,
                "tombstones_since_ms if behind",
                "state.tombstones_since_ms if behind",
            ),
        ),
        first=(_SECOND_HAND,),
    ),
    Mutation(
        "retention begins when the cluster has the tombstone, not when the row was deleted",
        (Edit("harmonylite.db.versions:settle_tombstones", "SET settled_ms = ?", "SET settled_ms = min(ts, ?)"),),
        first=(_DELETED_OFFLINE,),
    ),
    Mutation(
        "retention begins anew for a tombstone that the log lost",
        (Edit("harmonylite.db.marking:Marking._mark", "settled_ms = NULL", "settled_ms = settled_ms"),),
        first=(_AGAIN,),
    ),
    Mutation(
        "retention begins anew for a tombstone that a snapshot does not have",
        (Edit("harmonylite.db.reconcile:_mark", "settled_ms = NULL", "settled_ms = settled_ms"),),
        first=(_AGAIN_AFTER_A_MERGE,),
    ),
    Mutation(
        "tombstones are forgotten by the server's time, not by the node's",
        (Edit(_PRUNE, "before = server_ms -", "before = self._now_ms() -"),),
        first=(_YEAR_AHEAD,),
    ),
)
