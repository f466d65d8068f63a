"""JetStream as the replicas see it: numbered messages, each with the time it was stored at."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

from harmonylite import wire
from harmonylite.model import Group, Position, ReceivedGroup
from harmonylite.stream.lineage import Lineage, compare_lineage
from harmonylite.stream.log import StreamState

START_MS = 1_700_000_000_000
NS = 1_000_000


class Server:
    """One stream per shard. `streams`: all that a stream has stored and not lost, from its first message on; `firsts`:
    the number of the first one that is still to be had; `created`: when the stream was made, as the server says it.
    `lost`: what was stored, acknowledged and lost. `max_rows`: of a group that a stream can hold; None: any.
    """

    def __init__(self, shards: int) -> None:
        self.now_ms = START_MS
        self.streams: list[list[ReceivedGroup]] = [[] for _ in range(shards)]
        self.firsts = [1] * shards
        self.created = [self._made() for _ in range(shards)]
        self.lost: list[ReceivedGroup] = []
        self.max_rows: int | None = None

    def store(self, shard: int, group: Group) -> int:
        """Append a group, as it comes out of its encoding. Returns its sequence number."""
        self.now_ms += 1
        stream = self.streams[shard]
        encoded = wire.encode_group(group, compress=len(stream) % 2 == 0)
        stream.append(ReceivedGroup(wire.decode_group(encoded), len(stream) + 1, self.now_ms))
        return len(stream)

    def holds(self, group: Group) -> bool:
        return self.max_rows is None or len(group) <= self.max_rows

    def log(self) -> Iterator[ReceivedGroup]:
        """Every message that was ever stored."""
        yield from self.lost
        for stream in self.streams:
            yield from stream

    @staticmethod
    def name(shard: int) -> str:
        return f"changes-{shard + 1}"

    def position(self, shard: int, end: int) -> Position:
        """After message `end` of a stream; 0: before the first."""
        return Position(self.name(shard), self.created[shard], end, self._stored_ns(shard, end) or 0)

    def trim(self, shard: int, keep: int) -> None:
        """All but the last `keep` messages are discarded."""
        self.firsts[shard] = max(self.firsts[shard], len(self.streams[shard]) + 1 - keep)

    def lose(self, shard: int, count: int) -> None:
        """The last `count` messages are gone, and their numbers will be given out again. One stays of a trimmed stream:
        of an empty one nobody can tell whether it misses something, and an operator has to declare a node complete."""
        stream = self.streams[shard]
        first = self.firsts[shard]
        kept = max(first if first > 1 else 0, len(stream) - count)
        self.lost += stream[kept:]
        del stream[kept:]

    def recreate(self, shard: int) -> None:
        """The stream is made anew, empty."""
        self.now_ms += 1
        self.lost += self.streams[shard]
        self.streams[shard] = []
        self.firsts[shard] = 1
        self.created[shard] = self._made()

    def state(self, shard: int) -> StreamState:
        """As the server describes the stream."""
        last = len(self.streams[shard])
        first = self.firsts[shard] if last else 0
        return StreamState(
            *(self.name(shard), self.created[shard], first, last, last + 1 - first, 0, self.now_ms, 0.0),
            last_ns=self._stored_ns(shard, last),
        )

    def lineage(self, shard: int, position: Position) -> Lineage:
        """Whether reading may go on after a position: the gap test (`stream.lineage.same_log`)."""
        return compare_lineage(self.state(shard), position, self._stored_ns(shard, position.sequence))

    def _stored_ns(self, shard: int, sequence: int) -> int | None:
        stream = self.streams[shard]
        return stream[sequence - 1].stored_ms * NS if 0 < sequence <= len(stream) else None

    def _made(self) -> str:
        return datetime.fromtimestamp(self.now_ms / 1000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"
