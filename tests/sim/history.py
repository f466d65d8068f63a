"""A history: what applications, clocks, the network and crashes did, as plain data that can be run again.

The `repr` of a `History` is Python that makes the same history; any part of its steps is a history too, which is
what shrinking needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmonylite.model import Row, Value

HOUR = 3_600_000
Values = tuple[tuple[str, Value], ...]


# --- what an application's statement does -----------------------------------------------------------------------


@dataclass(frozen=True)
class Insert:
    """INSERT, INSERT OR REPLACE, INSERT OR IGNORE (`conflict`), or an upsert (`conflict` = "DO UPDATE")."""

    table: str
    key: Row
    values: Values
    conflict: str = ""


@dataclass(frozen=True)
class Update:
    """UPDATE of some columns of one row; `conflict`: "" or "OR REPLACE"."""

    table: str
    key: Row
    values: Values
    conflict: str = ""


@dataclass(frozen=True)
class UpdateAll:
    """One UPDATE of every row; fails as a whole if two rows would clash."""

    table: str
    values: Values


@dataclass(frozen=True)
class Rekey:
    """UPDATE of a row's key."""

    table: str
    key: Row
    new_key: Row
    conflict: str = ""


@dataclass(frozen=True)
class Delete:
    """DELETE of one row."""

    table: str
    key: Row


@dataclass(frozen=True)
class Swap:
    """Two rows exchange the value of a unique column, by way of NULL."""

    table: str
    key: Row
    other: Row
    column: str


Operation = Insert | Update | UpdateAll | Rekey | Delete | Swap


# --- what happens in the world ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """A transaction of the application at `node`; a statement that violates a constraint has no effect."""

    node: int
    operations: tuple[Operation, ...]
    commit: bool = True


@dataclass(frozen=True)
class Absorb:
    node: int


@dataclass(frozen=True)
class Collect:
    """Absorb and begin to read pending rows as groups, from the reader's pinned snapshot, from the writer's or under
    the write lock (`how`). Needs a node that is online and has consumed to the end since it connected.
    """

    node: int
    how: str = "reader"


@dataclass(frozen=True)
class Publish:
    """Send up to `count` collected groups. `fate`: "acked"; "late" (stored, the acknowledgements come with later
    ones); "lost" (the last one is never stored); "hole" (the first one is never stored, those behind it are);
    "unacked" (stored, but the node does not hear of the last). The last three break the node's connection.
    """

    node: int
    count: int
    fate: str = "acked"


@dataclass(frozen=True)
class Deliver:
    """Apply up to `count` next messages of a stream, with `again` older ones delivered once more before them."""

    node: int
    stream: int
    count: int
    again: int = 0


@dataclass(frozen=True)
class Sync:
    """Connect if offline, consume everything, publish everything: what a healthy node does all the time."""

    node: int


@dataclass(frozen=True)
class Prune:
    """Tombstones past their retention are forgotten, if the node is online and has consumed everything."""

    node: int


@dataclass(frozen=True)
class Absence:
    """`node` is cut off until it connects again; meanwhile all others exchange everything and, long enough later,
    forget their tombstones. Only in a history with `retention_ms`. trim: the log forgets them too, and what is left is
    a snapshot, if `node` was the only one that was away.
    """

    node: int
    trim: bool = False


@dataclass(frozen=True)
class Trim:
    """`node` takes a snapshot, if it has read everything, and the log forgets what came before it but for the last
    `keep` messages of each stream.
    """

    node: int
    keep: int = 0


@dataclass(frozen=True)
class Backup:
    """Somebody copies the node's database file."""

    node: int


@dataclass(frozen=True)
class Restore:
    """After it has published everything, the node's file is replaced by its last backup, if there is one; then it
    catches up. Only where clocks are right: else a write might be given a version that another one had before.
    """

    node: int


@dataclass(frozen=True)
class Lose:
    """The server loses the power: all are disconnected, and the last `count` messages of each stream are gone although
    they were acknowledged. recreate: it has lost its streams, and new ones are made. Only where clocks are right: else
    a version that the stream had bounded would be bounded otherwise when it is published again.
    """

    count: int
    recreate: bool = False


@dataclass(frozen=True)
class Replace:
    """The node's file is gone, and it gets the newest snapshot as its first database, if there is one that the log
    still continues. Before that it has published everything; `sudden`: it has not, and what only that file held must
    be in the snapshot. Only where clocks are right, as for `Restore`.
    """

    node: int
    sudden: bool = False


@dataclass(frozen=True)
class Perish:
    """The node is gone for good. What it alone had must be in a snapshot that another node merges later."""

    node: int


@dataclass(frozen=True)
class Join:
    """A node that has read everything brings in its rows from before the installation: it merges the newest snapshot,
    or takes the first one. At the end all do.
    """

    node: int


@dataclass(frozen=True)
class Connect:
    node: int


@dataclass(frozen=True)
class Disconnect:
    node: int


@dataclass(frozen=True)
class Stop:
    """The daemon is stopped in an orderly way; the application goes on."""

    node: int


@dataclass(frozen=True)
class Start:
    node: int


@dataclass(frozen=True)
class SetClock:
    """The node's clock now shows true time plus `offset_ms`."""

    node: int
    offset_ms: int


@dataclass(frozen=True)
class Wait:
    milliseconds: int


@dataclass(frozen=True)
class Limit:
    """From now on the streams hold no group of more than `rows` rows; None: any, as at the end of every history."""

    rows: int | None


@dataclass(frozen=True)
class Interrupt:
    """Run `step` and kill the daemon before its `statement`-th SQL statement (counted from 0), then start it."""

    step: Absorb | Collect | Publish | Deliver | Sync | Trim | Start
    statement: int


@dataclass(frozen=True)
class Race:
    """Run `step`; before its `statement`-th SQL statement the application commits `write` (as soon as the lock
    is free).
    """

    step: Absorb | Collect | Publish | Deliver | Sync | Trim | Start
    statement: int
    write: Write


Step = (
    Write
    | Absorb
    | Collect
    | Publish
    | Deliver
    | Sync
    | Prune
    | Trim
    | Backup
    | Restore
    | Lose
    | Replace
    | Perish
    | Join
    | Absence
    | Connect
    | Disconnect
    | Stop
    | Start
    | SetClock
    | Wait
    | Limit
    | Interrupt
    | Race
)


@dataclass(frozen=True)
class History:
    """`nodes` replicas with `tables`, their first rows made by `seed_rows` before HarmonyLite was installed.

    `shards`: number of streams; node i publishes to stream i % shards. `offsets`: each node's clock at the start.
    `listeners`: how many of the last nodes run with publish=false (their applications do not write).
    `time_known`: whether the server tells its time, so that a node knows the latest time that it may claim.
    `retention_ms`: after which tombstones are forgotten; None: never. Such a history has no steps in which a node
    publishes while there is something that it has not read for longer than that.
    `own_seeds`: rows from before the installation that only one node had, with that node.
    `skip_own`: acknowledged messages of the same session are passed over, as the stream's reader does.
    """

    nodes: int
    tables: tuple[str, ...]
    steps: tuple[Step, ...]
    seed_rows: tuple[Operation, ...] = ()
    shards: int = 1
    offsets: tuple[int, ...] = ()
    listeners: int = 0
    time_known: bool = True
    skip_own: bool = True
    own_seeds: tuple[tuple[int, Operation], ...] = ()
    group_rows: int = 512
    retention_ms: int | None = None

    def __str__(self) -> str:
        head = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in self.__dataclass_fields__
            if name not in ("steps", "seed_rows", "own_seeds")
        )
        lines = [f"History({head},", "  seed_rows=("]
        lines += [f"    {operation!r}," for operation in self.seed_rows]
        lines += ["  ),", "  own_seeds=("]
        lines += [f"    {seed!r}," for seed in self.own_seeds]
        lines += ["  ),", "  steps=("]
        lines += [f"    {step!r}," for step in self.steps]
        return "\n".join([*lines, "  ),", ")"])
