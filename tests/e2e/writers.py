"""An application that never stops writing, and a ledger of what its database acknowledged.

Run as a process of its own: `python -m tests.e2e.writers --db FILE --ledger FILE --node N`. Each line of the ledger
is one committed write, noted after COMMIT returned; the ledger is not part of any database. `verify` holds the
ledgers of all writers against the databases of all nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCHEMA = """
CREATE TABLE item (id TEXT PRIMARY KEY, node INTEGER NOT NULL, sequence INTEGER NOT NULL, payload TEXT);
CREATE INDEX item_node ON item (node, sequence);
"""

SHARED_KEYS = 60
WRITE = (
    "INSERT INTO item (id, node, sequence, payload) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (id) DO UPDATE SET node = excluded.node, sequence = excluded.sequence, payload = excluded.payload"
)
_ROOT = Path(__file__).parents[2]
# What the conversion of SQLite's julianday('now') to milliseconds may be off by.
ROUNDING_MS = 2


@dataclass(frozen=True)
class Write:
    """An acknowledged write. begun_ms, done_ms: the writer's clock once it held the lock, and after COMMIT; device:
    whose application it was, as two may have one node id (a cloned card)."""

    node: int
    sequence: int
    key: str
    deleted: bool
    begun_ms: int
    done_ms: int
    device: str = ""

    def line(self) -> str:
        return f"{self.node} {self.sequence} {self.key} {int(self.deleted)} {self.begun_ms} {self.done_ms}\n"

    @classmethod
    def parse(cls, line: str, device: str = "") -> Write:
        node, sequence, key, deleted, begun_ms, done_ms = line.split()
        return cls(int(node), int(sequence), key, deleted == "1", int(begun_ms), int(done_ms), device)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Writer:
    """Random transactions: new rows, edits and deletes of rows that all nodes fight over, several rows at once."""

    def __init__(self, db: Path, ledger: Path, node: int, seed: int, first: int = 0) -> None:
        self._connection = sqlite3.connect(db, timeout=60, isolation_level=None)
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._node = node
        self._random = random.Random(seed)
        self._sequence = first

    def close(self) -> None:
        self._connection.close()
        os.close(self._ledger)

    def transaction(self) -> None:
        """One transaction; what it changed stands in the ledger when this returns. Raises sqlite3.Error."""
        dice = self._random.random()
        if dice < 0.5:
            steps = [(f"n{self._node}-{self._sequence + 1}", False)]
        elif dice < 0.75:
            steps = [(self._shared(), False)]
        elif dice < 0.85:
            steps = [(self._shared(), True)]
        elif dice < 0.9:
            steps = [(f"n{self._node}-{self._random.randint(1, self._sequence + 1)}", True)]
        else:
            steps = [(self._shared(), self._random.random() < 0.2) for _ in range(self._random.randint(2, 6))]
        self._commit(steps)

    def _shared(self) -> str:
        return f"shared-{self._random.randrange(SHARED_KEYS)}"

    def _commit(self, steps: Sequence[tuple[str, bool]]) -> None:
        connection, written = self._connection, []
        connection.execute("BEGIN IMMEDIATE")
        try:
            begun = now_ms()
            for key, delete in steps:
                self._sequence += 1
                if delete:
                    changed = connection.execute("DELETE FROM item WHERE id = ?", (key,)).rowcount
                else:
                    payload = f"{self._node}-{self._sequence}-" + "x" * self._random.randrange(200)
                    changed = connection.execute(WRITE, (key, self._node, self._sequence, payload)).rowcount
                if changed:
                    written.append((self._sequence, key, delete))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        done = now_ms()
        lines = [Write(self._node, number, key, delete, begun, done).line() for number, key, delete in written]
        os.write(self._ledger, "".join(lines).encode())


def main() -> None:
    """Write until SIGTERM. A refused transaction (a full disk, say) is counted on standard output, not noted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--db", type=Path, required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="writes are numbered from here on")
    parser.add_argument("--pause-ms", type=float, default=20.0, help="mean pause between transactions")
    arguments = parser.parse_args()
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    writer = Writer(arguments.db, arguments.ledger, arguments.node, arguments.seed, arguments.first)
    pauses = random.Random(arguments.seed)
    while not stopping:
        try:
            writer.transaction()
        except sqlite3.Error as error:
            print(f"refused: {error}", flush=True)
        # Not time.sleep: under libfaketime it fails (clock_nanosleep(2) with an absolute time is refused).
        select.select([], [], [], pauses.expovariate(1000 / arguments.pause_ms))
    writer.close()


@dataclass
class WriterProcess:
    """A writer beside a node. `environment` is added to ours (a false clock, say). first: see `Writer`, for one that
    is started again, or shares its node id; folder: of its ledger, which otherwise is beside the database."""

    db: Path
    node: int
    seed: int = 0
    pause_ms: float = 20.0
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    first: int = 0
    folder: Path | None = None

    @property
    def ledger(self) -> Path:
        return (self.folder or self.db.parent) / "ledger.txt"

    @property
    def output(self) -> Path:
        return (self.folder or self.db.parent) / "writer.log"

    def start(self) -> WriterProcess:
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.e2e.writers", "--db", str(self.db), "--ledger", str(self.ledger)),
                    *("--node", str(self.node), "--seed", str(self.seed), "--pause-ms", str(self.pause_ms)),
                    *("--first", str(self.first)),
                ],
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
            )
        return self

    def stop(self) -> None:
        """Let it finish its transaction. Fails if it had ended before, by itself."""
        assert self.process is not None
        assert self.process.poll() is None, f"the writer of node {self.node} died: {self.output.read_text()}"
        self.process.terminate()
        assert self.process.wait(90) == 0, self.output.read_text()

    def writes(self) -> list[Write]:
        """The acknowledged ones, oldest first."""
        with self.ledger.open() as lines:
            return [Write.parse(line, str(self.ledger)) for line in lines]

    def refused(self) -> list[str]:
        return [line for line in self.output.read_text().splitlines() if line.startswith("refused")]


@contextlib.contextmanager
def writing(writers: Sequence[WriterProcess]) -> Iterator[None]:
    """The writers run inside the block; afterwards all have stopped in order, or been killed if the block failed."""
    try:
        for writer in writers:
            writer.start()
        yield
        for writer in writers:
            writer.stop()
    finally:
        for writer in writers:
            if writer.process is not None and writer.process.poll() is None:
                writer.process.kill()
                writer.process.wait()


# -- the verdict


@dataclass(frozen=True)
class Verdict:
    """How the acknowledged writes ended. visible: the row, or its absence, is that write in every database; beaten:
    another write of the same row has a later version everywhere. lost: neither. alien: rows nobody acknowledged.
    late: how long after the winning write its version claims to have been made, at most, ms."""

    acknowledged: int
    visible: int
    beaten: int
    lost: tuple[str, ...]
    alien: tuple[str, ...]
    late_ms: int

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged writes: {self.visible} in all databases, {self.beaten} beaten by a"
            f" later version, {len(self.lost)} lost, {len(self.alien)} rows from nowhere"
            f" (versions at most {self.late_ms} ms after their write)"
        )


@dataclass(frozen=True)
class _Row:
    version_ms: int
    node: int
    sequence: int | None
    """None: deleted."""


def verify(databases: Sequence[Path], writes: Iterable[Write]) -> Verdict:
    """Hold the ledgers against the databases, which must be identical (asserted)."""
    states = [_rows(db) for db in databases]
    assert all(state == states[0] for state in states), _differences(states)
    rows = states[0]
    by_key: dict[str, list[Write]] = defaultdict(list)
    for write in writes:
        by_key[write.key].append(write)
    visible = beaten = late_ms = 0
    lost: list[str] = []
    for key, made in by_key.items():
        row = rows.get(key)
        winner = None if row is None else _winner(row, made)
        if row is None or winner is None:
            lost.append(f"{key}: {row} is none of the {len(made)} writes acknowledged, the last {max(made, key=_end)}")
            continue
        visible += 1
        late_ms = max(late_ms, row.version_ms - winner.done_ms)
        for write in made:
            if write is winner:
                continue
            # A write begun after the version that won was not beaten by it, nor one made on the same device later.
            later = (write.node, write.device) == (winner.node, winner.device) and write.sequence > winner.sequence
            if write.begun_ms > row.version_ms + ROUNDING_MS or later:
                lost.append(f"{key}: {write} is newer than {row}")
            else:
                beaten += 1
    alien = [f"{key}: {row}" for key, row in rows.items() if key not in by_key]
    return Verdict(visible + beaten + len(lost), visible, beaten, tuple(lost), tuple(alien), late_ms)


def _end(write: Write) -> int:
    return write.done_ms


def _winner(row: _Row, made: Sequence[Write]) -> Write | None:
    """The write that a row shows. A tombstone does not name its write: the node's last delete it can be."""
    if row.sequence is not None:
        return next((w for w in made if (w.node, w.sequence, w.deleted) == (row.node, row.sequence, False)), None)
    fits = [w for w in made if w.node == row.node and w.deleted and w.begun_ms <= row.version_ms + ROUNDING_MS]
    return max(fits, key=lambda write: (write.begun_ms, write.sequence), default=None)


def _rows(db: Path) -> dict[str, _Row]:
    """Every versioned row of `item`; version and content must name the same writer (asserted)."""
    with contextlib.closing(sqlite3.connect(db, timeout=30)) as connection:
        found = {}
        sql = (
            "SELECT v.k0, v.ts, v.node, v.deleted, i.node, i.sequence"
            ' FROM "__harmonylite__item_version" AS v LEFT JOIN item AS i ON i.id = v.k0'
        )
        for key, ts, node, deleted, row_node, sequence in connection.execute(sql):
            assert bool(deleted) == (sequence is None), f"{db}: {key} is deleted={deleted} with row {sequence}"
            assert deleted or row_node == node, f"{db}: {key} has node {node}'s version and node {row_node}'s content"
            found[key] = _Row(ts, node, sequence)
        unversioned = 'SELECT id FROM item WHERE id NOT IN (SELECT k0 FROM "__harmonylite__item_version")'
        assert not connection.execute(unversioned).fetchall()
        return found


def _differences(states: Sequence[Mapping[str, _Row]]) -> str:
    keys = sorted({key for state in states for key in state})
    different = [key for key in keys if any(state.get(key) != states[0].get(key) for state in states)]
    shown = [f"{key}: {[state.get(key) for state in states]}" for key in different[:10]]
    return f"{len(different)} rows differ: " + "; ".join(shown)


if __name__ == "__main__":
    main()
