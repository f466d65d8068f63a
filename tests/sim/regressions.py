"""Histories that the engine once failed, as short as they could be made. All but the last have a server that does not
tell its time, and clocks that are off by hours."""

from __future__ import annotations

from tests.sim.history import (
    Collect,
    Deliver,
    Disconnect,
    History,
    Insert,
    Limit,
    Lose,
    Publish,
    SetClock,
    Sync,
    Trim,
    Update,
    UpdateAll,
    Wait,
    Write,
)

# A write gets a time of which the stream takes less; then the clock is set back, and the floor gave the next write of
# that row the same version as the first.
SAME_VERSION_TWICE = History(
    nodes=3,
    tables=("counter",),
    offsets=(3_171_840, -8_589_591, -259_200_000),
    time_known=False,
    skip_own=False,
    seed_rows=(Insert("counter", (1,), (("note", 0),)),),
    steps=(
        Write(0, (UpdateAll("counter", (("note", "first"),)),)),
        Sync(0),
        SetClock(0, -4_456_624),
        Write(0, (UpdateAll("counter", (("note", "second"),)),)),
        Wait(3_600_000),
    ),
)

# The same while the second write waits in the log as the first comes back.
SAME_VERSION_IN_THE_LOG = History(
    nodes=3,
    tables=("counter",),
    offsets=(365 * 86_400_000, 0, 0),
    time_known=False,
    skip_own=False,
    steps=(
        Write(0, (Insert("counter", (1,), (("note", "first"),)),)),
        Sync(0),
        SetClock(0, -1_690_000_000_000),
        Write(0, (Update("counter", (1,), (("note", "second"),)),)),
        Deliver(0, 0, 1, 1),
    ),
)

# The first write comes back, bounded, while another that is later waits to be published: the floor may not fall
# below that.
FLOOR_BELOW_A_PENDING_WRITE = History(
    nodes=3,
    tables=("any_key", "counter"),
    offsets=(31_536_000_000, -7_965_224, 10_240_965),
    time_known=False,
    skip_own=False,
    steps=(
        Write(0, (Insert("counter", (1,), (("note", -1),)),)),
        Sync(0),
        Write(0, (Insert("any_key", (1.0,), (("note", 5e-324),)),)),
        Deliver(0, 0, 1, 3),
        SetClock(0, -259_200_000),
        Write(0, (Insert("counter", (1,), (("note", ""),), "DO UPDATE"),)),
    ),
)

# Node 2 writes twice by a clock that is ahead, and reads its first write back, bounded by the stream's time, when the
# second is already there: that one's base claimed to have seen what node 1 wrote in between.
BASE_THAT_NOBODY_ELSE_HAS = History(
    nodes=4,
    tables=("no_rowid",),
    offsets=(-6_763_564, 8_664_227, 3_470_813, 4_765_235),
    time_known=False,
    skip_own=False,
    seed_rows=(Insert("no_rowid", ("x", 1), (("note", b"blob"),)),),
    steps=(
        Sync(2),
        Write(2, (Update("no_rowid", ("X", 1), (("note", "first"),), "OR REPLACE"),)),
        Collect(2, "reader"),
        Publish(2, 1, "acked"),
        Write(2, (Update("no_rowid", ("X", 1), (("note", "second"),), "OR REPLACE"),)),
        Write(1, (Insert("no_rowid", ("x", 1), (("note", "lost"),), "OR REPLACE"),)),
    ),
)

# A transaction waits because it is larger than the stream, and a snapshot is taken. Half of it is overwritten, so that
# the rest fits and is published; the log loses that, and the snapshot has the row, though nobody else does.
PUBLISHED_AFTER_THE_SNAPSHOT_AND_LOST = History(
    nodes=3,
    tables=("text key",),
    skip_own=False,
    steps=(
        Limit(1),
        Write(1, (Insert("text key", (7,), (("note", 1.5),)), Insert("text key", ("A",), (("note", "text"),)))),
        Sync(1),
        Trim(1, 3),
        Write(2, (Insert("text key", (7,), (("note", 1.5),)),)),
        Sync(2),
        Sync(1),
        Lose(1, False),
    ),
)

# The log loses a message that node 1 has read, gives its number out again, and discards what came in its place, so that
# it begins just after the number at which node 1 had stopped.
LOST_AND_TRIMMED_TO_THE_POSITION = History(
    nodes=3,
    tables=("counter",),
    steps=(
        Write(0, (Insert("counter", (1,), (("note", "known"),), "OR REPLACE"),)),
        Sync(0),
        Sync(1),
        Sync(2),
        Disconnect(1),
        Lose(1, False),
        Write(2, (Insert("counter", (2,), (("note", "in its place"),), "OR REPLACE"),)),
        Sync(2),
        Sync(0),
        Trim(0, 0),
        Sync(1),
    ),
)

REGRESSIONS = {
    "same version twice": SAME_VERSION_TWICE,
    "same version in the log": SAME_VERSION_IN_THE_LOG,
    "floor below a pending write": FLOOR_BELOW_A_PENDING_WRITE,
    "base that nobody else has": BASE_THAT_NOBODY_ELSE_HAS,
    "published after the snapshot, and lost": PUBLISHED_AFTER_THE_SNAPSHOT_AND_LOST,
    "lost, and trimmed to the position": LOST_AND_TRIMMED_TO_THE_POSITION,
}
