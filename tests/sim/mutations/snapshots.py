"""Snapshots, merging them, and what is done with rows that they do not have (docs/rules.md, Catching up)."""

from __future__ import annotations

from tests.sim.breaking import Edit, Mutation
from tests.sim.history import (
    HOUR,
    Connect,
    Delete,
    Deliver,
    Disconnect,
    History,
    Interrupt,
    Join,
    Perish,
    Race,
    Replace,
    Step,
    Sync,
    Trim,
    Update,
    Wait,
    Write,
)
from tests.sim.mutations.refilling import DELETED_HERE, NEWER_HERE, UNKNOWN_THERE
from tests.sim.mutations.steps import KNOWN, mail, row

_MERGER = "harmonylite.db.merge:Merger"
_GAP = "harmonylite.stream.lineage:compare_lineage"
_ARRIVE = "harmonylite.db.completeness:Completeness.arrive"
_TAKE = "harmonylite.db.reconcile:take"
_MARK = "harmonylite.db.reconcile:_mark"

_LEFT_BEHIND: tuple[Step, ...] = (Write(0, (row(2, "published"),)), Sync(0), Sync(2))

# Node 1 is left behind by the log.
_TRIMMED = History(
    nodes=3, tables=("counter",), steps=(*KNOWN, Write(0, (row(1, "new"),)), Sync(0), Sync(2), Trim(0, 0))
)
_DELETED = History(
    nodes=3, tables=("counter",), steps=(*KNOWN, Write(0, (Delete("counter", (1,)),)), Sync(0), Sync(2), Trim(0, 0))
)

# Node 0 dies with a row that it had not published, of which there is nothing but its snapshot.
_PENDING: tuple[Step, ...] = (*KNOWN, *_LEFT_BEHIND, Write(0, (row(3, "waits"),)), Trim(0, 0))
_TAKER_DIES = History(nodes=3, tables=("counter",), steps=(*_PENDING, Perish(0)))

# Its file is replaced by its own snapshot, which nobody else needs.
_TAKER_REPLACED = History(
    nodes=3,
    tables=("counter",),
    steps=(*KNOWN, Write(0, (row(3, "waits"),)), Trim(0, 0), Replace(0, sudden=True)),
)

# The snapshot holds the first of two writes made by a clock that is a year ahead; the second one is published.
_YEAR_AHEAD = History(
    nodes=3,
    tables=("counter",),
    offsets=(365 * 24 * HOUR, 0, 0),
    time_known=False,
    steps=(
        *KNOWN,
        *_LEFT_BEHIND,
        Write(0, (row(4, "published"),)),
        Sync(0),
        Sync(2),
        Write(0, (row(3, "waits"),)),
        Trim(0, 1),
        Write(0, (Update("counter", (3,), (("note", "second"),)),)),
        Sync(0),
        Wait(1_000),
        Sync(1),
    ),
)

# Just before the snapshot's view is fixed, the application writes.
_WRITTEN_MEANWHILE = tuple(
    History(
        nodes=3,
        tables=("counter",),
        steps=(
            *KNOWN,
            Race(Trim(0, 0), statement, Write(0, (Update("counter", (1,), (("note", "meanwhile"),)),))),
        ),
    )
    for statement in range(20)
)

# Node 1 has written and not absorbed; the snapshot has the row newer than what node 1 had before.
_UNABSORBED = History(
    nodes=3,
    tables=("counter",),
    time_known=False,
    steps=(
        *KNOWN,
        Disconnect(1),
        Write(0, (Update("counter", (1,), (("note", "there"),)),)),
        Sync(0),
        Trim(0, 0),
        Wait(1_000),
        Write(1, (Update("counter", (1,), (("note", "here"),)),)),
        Sync(1),
    ),
)

# Node 2 has read one stream beyond the snapshot that it needs for the other.
_TWO_STREAMS = History(
    nodes=3,
    tables=("counter",),
    shards=2,
    steps=(
        Connect(2),
        Write(0, (row(1, "before"),)),
        Sync(0),
        Trim(0, 0),
        Write(1, (row(2, "after"),)),
        Sync(1),
        Deliver(2, 1, 5),
        Sync(2),
    ),
)

# A message comes just after the snapshot.
_NEXT_MESSAGE = History(
    nodes=3,
    tables=("counter",),
    steps=(*KNOWN, *_LEFT_BEHIND, Trim(0, 0), Write(2, (row(3, "next"),)), Sync(2), Sync(1)),
)

_KILLED = tuple(
    History(
        nodes=3,
        tables=("counter",),
        steps=(
            *KNOWN,
            Write(0, tuple(row(key, "new") for key in (1, 2, 3, -1, 2**63 - 1))),
            Sync(0),
            Trim(0, 0),
            Interrupt(Sync(1), statement),
        ),
    )
    for statement in range(10, 80, 3)
)


def _wandered(table: str) -> History:
    """A value wandered from a row to another one, which is older than the first one was here."""
    return History(
        nodes=3,
        tables=(table,),
        offsets=(0, 50_000, 0),
        steps=(
            Write(1, (mail(4, "a", table),)),
            Sync(1),
            Sync(0),
            Sync(2),
            Disconnect(1),
            Write(
                0,
                (
                    mail(2, "b", table),
                    mail(3, "c", table),
                    Update(table, (4,), (("email", None),)),
                    mail(1, "a", table),
                ),
            ),
            Sync(0),
            Sync(2),
            Trim(0, 0),
        ),
    )


# Each node has rows from before the installation, one of them the same key with another content.
_OWN_ROWS = History(
    nodes=3,
    tables=("counter",),
    steps=(Join(1),),
    own_seeds=((0, row(1, "of 0")), (1, row(2, "of 1")), (1, row(3, "of 1")), (2, row(3, "of 2"))),
)

_TWINS = tuple(
    History(
        nodes=3,
        tables=("counter",),
        steps=(Join(1),),
        own_seeds=((1, row(3, "of 1")), (2, row(3, f"of 2, {number}"))),
    )
    for number in range(5)
)

# The same, edited elsewhere a while ago: any version beats none.
_EDITED_SEED = History(
    nodes=3,
    tables=("counter",),
    steps=(
        Write(0, (Update("counter", (3,), (("note", "edited"),)),)),
        Sync(0),
        Trim(0, 0),
        Wait(1_000),
        Sync(1),
    ),
    own_seeds=((0, row(3, "of 0")), (1, row(3, "of 1"))),
)

MUTATIONS: tuple[Mutation, ...] = (
    # taking one
    Mutation(
        "no row of a snapshot is newer than its version: the change logs are empty in it",
        (Edit("harmonylite.db.copy:start_copy", "if not replica.absorbing.has_log(writer):", "if True:"),),
        first=_WRITTEN_MEANWHILE,
    ),
    Mutation(
        "a snapshot's positions are those of the view that was copied",
        (
            Edit(
                "harmonylite.db.copy:Copy.pin",
                "tables.load_positions(self._source)",
                "tuple(Position(p.stream, p.created, p.sequence + 1, 0) for p in tables.load_positions(self._source))",
            ),
        ),
        first=(_NEXT_MESSAGE,),
    ),
    Mutation(
        "a snapshot's pending marks are adopted by who merges it",
        (Edit(_TAKE, "if each.pending or", "if False or"),),
        first=(_TAKER_DIES,),
    ),
    Mutation(
        "a snapshot's pending marks are adopted by the node whose first database it becomes",
        (
            Edit(
                "harmonylite.db.copy:adopt_copy",
                'tables.set_meta(connection, "boot_id", "")',
                'tables.set_meta(connection, "boot_id", ""); tables.set_meta(connection, "published_batch", 1 << 40)',
            ),
        ),
        first=(_TAKER_REPLACED,),
    ),
    Mutation(
        "an adopted version is bounded as the stream would have bounded it",
        (Edit("harmonylite.db.together:Together._bounded", "if not found.pending or", "if True or"),),
        first=(_YEAR_AHEAD,),
    ),
    # which one, and where reading goes on
    Mutation(
        "I3: a trimmed log is noticed",
        (Edit(_GAP, "if state.first_seq > position.sequence + 1:", "if False:"),),
        first=(_TRIMMED,),
    ),
    Mutation(
        "I3: after a merge reading goes on at the snapshot's positions",
        (Edit(_ARRIVE, "tables.save_position(writer, position)", "pass"),),
        first=(_TRIMMED,),
    ),
    Mutation(
        "or at this node's positions, where those are larger",
        (Edit(_ARRIVE, "if known is None or", "if True or"),),
        first=(_TWO_STREAMS,),
    ),
    Mutation(
        "I3: positions are set last: a merge that was killed is done again",
        (
            Edit(
                f"{_MERGER}.open",
                "self._plan()",
                "self._plan(); self._replica.judge(lambda _: self._replica.completeness.arrive(self._positions,"
                " synced_at_ms=0, tombstones_since_ms=self._since_ms))",
            ),
        ),
        first=_KILLED,
    ),
    # merging
    Mutation(
        "the snapshot's newer rows are taken",
        (
            Edit(
                "harmonylite.db.difference:_versioned",
                "(v.ts IS NULL OR (s.ts, s.node, s.rank) >",
                "(v.ts IS NULL OR (s.ts, s.node, s.rank) <",
            ),
        ),
        first=(_TRIMMED,),
    ),
    Mutation(
        "the snapshot's tombstones are taken",
        (Edit("harmonylite.db.difference:_versioned", "(s.deleted OR", "(NOT s.deleted AND"),),
        first=(_DELETED,),
    ),
    Mutation(
        "I3: what the application wrote is absorbed before it is compared",
        (
            Edit(
                "harmonylite.db.absorbing:Absorbing.before",
                "if self.piece(bound_ms, correction).drained:",
                "if True:",
            ),
        ),
        first=(_UNABSORBED,),
    ),
    Mutation(
        "a unique value that wandered is no clash: its rows are merged together",
        (Edit("harmonylite.db.together:Together.completed", "while todo and", "while False and"),),
        first=(_wandered("one_unique"),),
    ),
    Mutation(
        "a unique value that wandered is no clash: nor through an index that is no constraint",
        (Edit("harmonylite.db.rivals:Rivals.__init__", "in listed if (found", "in listed if sql is None and (found"),),
        first=(_wandered("expression_unique"),),
    ),
    # rows that the snapshot does not have, or has older
    Mutation(
        "what the snapshot lacks, in the window of tombstones, is published",
        (Edit("harmonylite.db.difference:marking", "(s.ts IS NULL OR (v.ts,", "(false OR (v.ts,"),),
        first=(UNKNOWN_THERE,),
    ),
    Mutation(
        "what the snapshot lacks, in the window of tombstones, is not deleted",
        (Edit(f"{_MERGER}._plan", "known >= self._since_ms", "False"),),
        first=(UNKNOWN_THERE,),
    ),
    Mutation(
        "what is newer here than there is published",
        (Edit("harmonylite.db.difference:marking", "(v.ts, v.node, v.rank) > (s.ts, s.node, s.rank)", "false"),),
        first=(NEWER_HERE,),
    ),
    Mutation(
        "tombstones that are news to the snapshot are published",
        (
            Edit(
                "harmonylite.db.difference:marking",
                "(s.ts IS NULL OR (v.ts, v.node, v.rank) > (s.ts, s.node, s.rank) OR {same})",
                "(NOT v.deleted AND (s.ts IS NULL OR (v.ts, v.node, v.rank) > (s.ts, s.node, s.rank) OR {same}))",
            ),
        ),
        first=(DELETED_HERE,),
    ),
    Mutation(
        "what a merge marks is published at the version that it has",
        (Edit(_MARK, "SET batch = ?, settled_ms = NULL", "SET ts = ts + 1, batch = ?, settled_ms = NULL"),),
        first=(NEWER_HERE,),
    ),
    # rows from before the installation
    Mutation(
        "rows without a version that the snapshot lacks are published",
        (Edit(_MARK, "if store.read(writer, table, each.key) is None:", "if True:"),),
        first=(_OWN_ROWS,),
    ),
    Mutation(
        "without a version: any version beats them",
        (Edit(_MARK, "0, 0, ?)", f"{1_800_000_000_000}, 1, ?)"),),
        first=(_OWN_ROWS, _EDITED_SEED),
    ),
    Mutation(
        "rows without a version that are missing here are taken",
        (
            Edit(
                "harmonylite.db.difference:taking",
                "_versioned(theirs, mine), _unversioned(theirs, mine)",
                "(_versioned(theirs, mine),)",
            ),
        ),
        first=(_OWN_ROWS,),
    ),
    Mutation(
        "of two rows without a version the content decides",
        (Edit("harmonylite.db.resolve:Resolver._judge_twins", "if theirs > ours:", "if False:"),),
        first=(_OWN_ROWS,),
    ),
    Mutation(
        "a row of the same version whose content wins here is published",
        (Edit(_TAKE, "(each.twin and", "(False and"),),
        first=_TWINS,
    ),
    Mutation(
        "I10: of two rows without a version the other one is recorded",
        (
            Edit(
                "harmonylite.db.resolve:Resolver._judge_twins",
                "self._conflict(table, row.key, row.version, local.version, TWINS, row.values)",
                "pass",
            ),
            Edit("harmonylite.db.resolve:Resolver._judge_twins", "TWINS if old is not None else None", "None"),
        ),
        first=(_OWN_ROWS,),
    ),
)
