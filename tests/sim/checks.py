"""What must hold when everybody has received everything, each property as a check of its own.

`tests/sim/reference.py` says how rows are compared; here stands what the outcome is compared with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import apsw

from harmonylite.model import UNVERSIONED, Group, Version
from tests.sim.history import SetClock
from tests.sim.observe import Conflict, conflicts_of
from tests.sim.reference import (
    Observed,
    Place,
    RowWrite,
    Violation,
    changes_of,
    honest_outcome,
    last_writer_wins,
    rows_of,
)
from tests.sim.tables import TABLES, RowState

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

# Timestamps of one row grow by one per write in the same instant; histories are far shorter than this.
_INCREMENTS_MS = 1_000


def check_all(world: World) -> None:
    """Every property of the end state. Raises Violation."""
    nodes = world.living()
    states = [node.observe() for node in nodes]
    for node, state in zip(nodes, states, strict=True):
        _intact(node, state)
    _identical(world, nodes, states)
    final = states[0]
    writes: dict[Place, list[RowWrite]] = defaultdict(list)
    for write in world.writes:
        writes[write.place].append(write)
    known = {place: of_place for place, of_place in writes.items() if place not in world.revived}
    _equals_log(world, final)
    _content_was_written(world, final, writes)
    _later_beats_earlier(world, final, known)
    _honest_clocks_predict(world, final)
    _causality(world, final, known)
    _own_rows_present(final, known)
    _transactions_whole(world, writes)
    conflicts = set(_recorded_conflicts(world))
    _clashes_explained(final, conflicts)
    _clashes_lost_to_newer(world, final)
    _losers_recorded(world, final, known, {row for _, _, row in conflicts})


def _intact(node: Node, state: Observed) -> None:
    """The file is sound, the application's own index is right, nothing waits."""
    connection = node.application.connection
    if (answer := connection.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
        raise Violation(f"node {node.id}: integrity_check says {answer}")
    if state.log_rows:
        raise Violation(f"node {node.id}: change logs still hold {state.log_rows} rows")
    for name in node.world.history.tables:
        if index := TABLES[name].full_text_index:
            try:
                connection.execute(f"INSERT INTO {index} ({index}, rank) VALUES ('integrity-check', 1)")
            except apsw.CorruptError as error:
                raise Violation(f"I8: node {node.id}: {index} does not match {name}: {error}") from error
    for table in ("parked", "undecodable"):
        if waiting := connection.execute(f"SELECT * FROM __harmonylite__{table}").fetchall():
            raise Violation(f"node {node.id}: {table}: {waiting}")


def _identical(world: World, nodes: Sequence[Node], states: Sequence[Observed]) -> None:
    """I4: rows and versions are the same on all nodes."""
    first = states[0]
    for node, state in zip(nodes[1:], states[1:], strict=True):
        for what, mine, theirs in (
            ("row", first.rows, state.rows),
            ("version", first.versions, state.versions),
        ):
            for place in sorted({*mine, *theirs}, key=repr):
                forgotten = (
                    what == "version" and world.history.retention_ms and (place not in mine or place not in theirs)
                )
                if mine.get(place) != theirs.get(place) and not forgotten:
                    raise Violation(
                        f"I4: {what} of {place}: {mine.get(place)} on node {nodes[0].id},"
                        f" {theirs.get(place)} on node {node.id}"
                    )


def _equals_log(world: World, final: Observed) -> None:
    """I4, I5: every row is what the plain reference makes of the server's log, clash tombstones included."""
    expected = last_writer_wins(world.log(), world.tolerance_ms)
    for place in sorted({*expected, *final.versions} - world.revived, key=repr):
        version, row = expected.get(place, (UNVERSIONED, None))
        seen = final.versions.get(place, (UNVERSIONED, False))[0]
        if world.history.retention_ms and row is None and seen <= version and place not in final.rows:
            continue  # the tombstone is forgotten, or only an older one is remembered
        if seen != version:
            raise Violation(f"I5: {place} has version {seen}, the log's highest is {version}")
        if version != UNVERSIONED and final.rows.get(place) != row:
            raise Violation(f"I5: {place} is {final.rows.get(place)}, the log's {version} is {row}")


def _content_was_written(world: World, final: Observed, writes: dict[Place, list[RowWrite]]) -> None:
    """A row's content is one that an application wrote as a whole; a missing row was deleted or lost a clash."""
    for place, of_place in writes.items():
        row = final.rows.get(place)
        version, _ = final.versions.get(place, (UNVERSIONED, False))
        forgotten = world.history.retention_ms and version == UNVERSIONED and row is None
        buried = TABLES[place[0]].unique and (version.rank == 1 or forgotten)
        if not buried and row not in {write.after for write in of_place}:
            raise Violation(f"{place} is {row}, which nobody wrote")
    for place in final.rows.keys() - writes.keys():
        raise Violation(f"{place} is {final.rows[place]}, which nobody wrote")


def _winner(place: Place, final: Observed, of_place: list[RowWrite]) -> RowWrite | None:
    """The write whose content the row has; None if it is absent (which of several deletes won does not show)."""
    row = final.rows.get(place)
    return None if row is None else next(write for write in reversed(of_place) if write.after == row)


def _later_beats_earlier(world: World, final: Observed, writes: dict[Place, list[RowWrite]]) -> None:
    """I5: no row comes from a write that is older than another by more than the clocks differed."""
    offsets = [0, *(node.offset_ms for node in world.nodes), *world.history.offsets]
    offsets += [step.offset_ms for step in world.history.steps if isinstance(step, SetClock)]
    skew = max(offsets) - min(offsets)
    for place, of_place in writes.items():
        winner = _winner(place, final, of_place)
        newest = max(write.true_ms for write in of_place)
        if winner is not None and not TABLES[place[0]].unique and winner.true_ms < newest - skew - _INCREMENTS_MS:
            raise Violation(
                f"I5: {place} is {winner.after}, written {newest - winner.true_ms} ms before the last write;"
                f" clocks differed by {skew} ms"
            )


def _honest_clocks_predict(world: World, final: Observed) -> None:
    """With right clocks the application's writes alone tell the outcome, with no look at any version."""
    clocks_stepped = any(write.node and write.logged_ms != write.true_ms for write in world.writes)
    if any(world.history.offsets) or clocks_stepped:
        return
    contested = _contested(world)
    for place, row in honest_outcome(world.writes).items():
        known = place not in world.revived and place not in contested
        if TABLES[place[0]].exact and known and final.rows.get(place) != row:
            raise Violation(f"I5: {place} is {final.rows.get(place)}, the latest write was {row}")


def _contested(world: World) -> dict[Place, set[RowState]]:
    """Rows of which nodes had different ones before the installation, and nobody wrote another since."""
    had: dict[Place, set[RowState]] = defaultdict(set)
    for rows in world.had:
        for place, row in rows.items():
            had[place].add(row)
    written = {write.place for write in world.writes if write.node}
    return {place: rows for place, rows in had.items() if len(rows) > 1 and place not in written}


def _causality(world: World, final: Observed, writes: dict[Place, list[RowWrite]]) -> None:
    """I6: no row is one that a later write had already seen and replaced.

    Where nobody knows the server's time, a claim that came with a snapshot is bounded there, and once more when its own
    node has published it, later: an edit made in between beats the first only. (A daemon knows the time.)
    """
    for place, of_place in writes.items():
        if place in world.claimed and not world.history.time_known:
            continue
        winner = _winner(place, final, of_place)
        if winner is None:
            continue
        for write in of_place:
            # Who saw what before the installation nobody can tell.
            if write.node and write.before == winner.after and write.after != winner.after:
                raise Violation(f"I6: {place} is {winner.after}, but node {write.node} replaced it: {write}")


def _own_rows_present(final: Observed, writes: dict[Place, list[RowWrite]]) -> None:
    """I3: a row that only one node ever touched is as that node left it, everywhere."""
    for place, of_place in writes.items():
        nodes = {write.node for write in of_place} - {0}
        if len(nodes) == 1 and not TABLES[place[0]].unique and final.rows.get(place) != of_place[-1].after:
            raise Violation(f"I3: {place} is {final.rows.get(place)}, its only writer left {of_place[-1].after}")


def _transactions_whole(world: World, writes: dict[Place, list[RowWrite]]) -> None:
    """I7: a group that holds a row of a transaction comes with, or after, all that the transaction did.

    Only rows that one node alone writes are looked at: what another node overwrote need not be sent.
    """
    for node in world.nodes:
        mine = {place for place, of_place in writes.items() if {write.node for write in of_place} <= {0, node.id}}
        for groups in node.collected:
            contents = [_contents(group) for group in groups]
            for transaction in node.transactions:
                _whole(node, contents, [write for write in transaction if write.place in mine], writes)


def _whole(
    node: Node,
    contents: list[set[tuple[Place, RowState | None]]],
    transaction: list[RowWrite],
    writes: dict[Place, list[RowWrite]],
) -> None:
    rows = {(write.place, write.after) for write in transaction if write.after is not None}
    first = next((number for number, content in enumerate(contents) if rows & content), None)
    if first is None:
        return
    for write in transaction:
        # The row as the transaction left it, or as the same node left it later.
        states = {(write.place, each.after) for each in writes[write.place] if each.number >= write.number}
        if TABLES[write.place[0]].unique:
            states.add((write.place, None))  # it lost a clash before it was sent
        sent = next((number for number, content in enumerate(contents) if states & content), None)
        if sent is not None and sent > first:
            raise Violation(
                f"I7: node {node.id} sent {rows & contents[first]} with a group, and {write.place},"
                f" written in the same transaction, {sent - first} groups later"
            )


def _contents(group: Group) -> set[tuple[Place, RowState | None]]:
    return {(place, row) for changes in group.tables for place, _, row in rows_of(changes)}


def _recorded_conflicts(world: World) -> Iterator[Conflict]:
    """Every row in a conflict log, those of files that were replaced by a backup among them."""
    yield from world.lost_conflicts
    for node in world.living():
        yield from conflicts_of(node.application.connection)


def _clashes_explained(final: Observed, conflicts: set[Conflict]) -> None:
    """I10: a row that was buried by a unique clash stands in a conflict log."""
    explained = {(table, version[:2]) for table, version, _ in conflicts}
    for place, (version, _) in final.versions.items():
        if version.rank == 1 and (place[0], version[:2]) not in explained:
            raise Violation(f"I10: {place} lost a clash with {version}; no conflict log says so")


def _clashes_lost_to_newer(world: World, final: Observed) -> None:
    """No good row dies: one that was buried by a unique clash met one that is newer, somewhere, some time."""
    contents: dict[tuple[Place, Version], RowState | None] = {}
    for received in world.log():
        contents |= {(each.place, each.effective): each.row for each in changes_of(received, world.tolerance_ms)}
    for node in world.nodes:
        contents |= node.reference.contents
    rivals = list(contents.items())
    for node in world.nodes:
        # Also those that only one transaction ever saw.
        rivals += [((place, Version(ts, node.id)), row) for place, ts, row in node.reference.claims]
    for place, (version, _) in final.versions.items():
        row = contents.get((place, version._replace(rank=0)))
        if version.rank == 0 or row is None:
            continue
        table = TABLES[place[0]]
        if not any(
            rival is not None and other[:2] >= version[:2] and table.clash(row, rival)
            for (rival_place, other), rival in rivals
            if rival_place[0] == table.name and rival_place != place
        ):
            raise Violation(f"{place}: {row} lost a clash with {version}, and there never was a newer row that clashes")


def _losers_recorded(
    world: World, final: Observed, writes: dict[Place, list[RowWrite]], recorded: set[tuple[int, ...]]
) -> None:
    """I10: a row that nobody had seen and replaced, and that is not there, stands in a conflict log. Not where the log
    lost a version of the row, or a snapshot was merged in its stead: who wrote over it says that it had seen that one,
    and the others never did (docs/rules.md)."""
    unseen = world.passed_over | {
        change.place for received in world.server.lost for change in changes_of(received, world.tolerance_ms)
    }
    for place, of_place in writes.items():
        if place in unseen:
            continue
        serial = TABLES[place[0]].columns.index("serial")
        replaced = {write.before for write in of_place}
        for write in of_place:
            lost = write.after is not None and write.after != final.rows.get(place) and write.after not in replaced
            if write.node and lost and write.after is not None and (write.after[serial][1],) not in recorded:
                raise Violation(f"I10: nobody recorded the loss of {write}")
    for place, rows in _contested(world).items():
        serial = TABLES[place[0]].columns.index("serial")
        for row in rows - {final.rows.get(place)}:
            if (row[serial][1],) not in recorded:
                raise Violation(f"I10: nobody recorded the loss of {row}, which a node had before the installation")
