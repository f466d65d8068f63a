"""Where transactions end in the logs: pieces end there, and nowhere that only seems to be one."""

from __future__ import annotations

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonylite.db import versions
from harmonylite.db.boundaries import Boundaries
from harmonylite.db.marking import Marking
from tests.db.conftest import MakeNode
from tests.db.harness import Node

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)"
BOTH = f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY, v TEXT)"


def insert(node: Node, first: int, count: int, *tables: str) -> None:
    """One transaction that writes the same keys into each table."""
    with node.transaction():
        for table in tables:
            node.app.execute(
                f"WITH RECURSIVE s(x) AS (SELECT ?1 UNION ALL SELECT x + 1 FROM s WHERE x < ?1 + ?2 - 1)"
                f" INSERT INTO {table} SELECT x, 'x' FROM s",
                (first, count),
            )


def test_pieces_end_where_a_transaction_does() -> None:
    boundaries = Boundaries()
    boundaries.sighted(7, {"t": 100})
    boundaries.sighted(7, {"t": 180})
    boundaries.sighted(7, {"t": 900})
    assert boundaries.next(7, {"t": 0}, {"t": 1_000}, 200) == {"t": 180}  # the last one within the limit
    boundaries.absorbed(8, {"t": 180})
    assert boundaries.next(8, {"t": 180}, {"t": 1_000}, 200) == {"t": 900}  # the next one, in several pieces
    boundaries.absorbed(9, {"t": 380})
    assert boundaries.next(9, {"t": 380}, {"t": 1_000}, 200) == {"t": 900}
    boundaries.absorbed(10, {"t": 900})
    assert boundaries.next(10, {"t": 900}, {"t": 1_000}, 200) == {"t": 1_000}


def test_what_was_sighted_before_another_absorb_does_not_count() -> None:
    boundaries = Boundaries()
    boundaries.sighted(7, {"t": 100})
    assert boundaries.next(8, {"t": 0}, {"t": 300}, 200) == {"t": 300}
    boundaries.absorbed(9, {"t": 200})
    # That was rolled back: the state has its old batch again.
    assert boundaries.next(8, {"t": 0}, {"t": 400}, 200) == {"t": 400}


def test_a_log_that_was_emptied_counts_from_one_again() -> None:
    boundaries = Boundaries()
    boundaries.sighted(1, {"t": 100, "u": 50})
    assert boundaries.next(1, {"t": 0, "u": 0}, {"t": 100, "u": 500}, 150) == {"t": 100, "u": 50}
    boundaries.absorbed(2, {"t": 100, "u": 50})
    # t is empty, and then has new rows that are written together with rows of u beyond 500.
    assert boundaries.next(2, {"t": 0, "u": 50}, {"t": 20, "u": 520}, 150) == {"u": 500}


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=40), st.integers(1, 60))
def test_every_piece_that_is_whole_ends_at_a_commit(commits: list[tuple[int, bool]], limit: int) -> None:
    boundaries = Boundaries()
    end = first = 0
    batch = 0
    ends_of_transactions = {0}
    for rows, absorbs in commits:
        end += rows
        ends_of_transactions.add(end)
        boundaries.sighted(batch, {"t": end})
        if absorbs:
            upto = boundaries.next(batch, {"t": first}, {"t": end}, limit)["t"]
            assert upto in ends_of_transactions
            assert first < upto <= end
            first = min(upto, first + limit)
            batch += 1
            boundaries.absorbed(batch, {"t": first})
            if first == end:  # the log is empty
                end = first = 0
                ends_of_transactions = {0}


def test_i7_a_long_log_is_not_one_transaction_where_its_ends_were_seen(make: MakeNode) -> None:
    node, other = make(1, BOTH), make(2, BOTH)
    size = versions.ABSORB_ROWS // 5 * 2
    for number in range(6):
        insert(node, number * size, size, "t", "u")
        node.replica.absorbing.sight(on_writer=number % 2 == 0)
    sent = node.outgoing()
    assert [len(each.group) for each in sent] == [2 * size] * 6
    for each in sent:
        other.apply(each.group)
        assert other.rows("t") == other.rows("u")
    assert other.rows("t") == node.rows("t")


def test_i7_without_having_seen_its_ends_a_long_log_is_one(make: MakeNode) -> None:
    node = make(1, BOTH)
    for number in range(3):
        insert(node, number * versions.ABSORB_ROWS, versions.ABSORB_ROWS, "t")
    (sent,) = node.outgoing()
    assert len(sent.group) == 3 * versions.ABSORB_ROWS


def test_a_row_that_changes_again_holds_its_transactions_together(make: MakeNode) -> None:
    node = make(1, BOTH)
    insert(node, 0, versions.ABSORB_ROWS, "t")
    node.replica.absorbing.sight(on_writer=False)
    with node.transaction():
        node.app.execute("UPDATE t SET v = 'y' WHERE id = 5")
        node.app.execute("INSERT INTO u VALUES (1, 'y')")
    (sent,) = node.outgoing()
    assert len(sent.group) == versions.ABSORB_ROWS + 1


def test_an_open_snapshot_sees_nothing_new(make: MakeNode) -> None:
    node = make(1, PLAIN)
    insert(node, 0, 10, "t")
    node.absorb()
    pinned = node.replica.outgoing.read()
    assert pinned is not None
    node.replica.absorbing.sight(on_writer=False)
    assert len(list(pinned)) == 1


def test_i7_boundaries_of_an_absorb_that_was_rolled_back_are_forgotten(make: MakeNode) -> None:
    """Else marking takes the batch that was given up, and the transaction is cut where that absorb had come to."""
    node = make(1, BOTH)
    insert(node, 1, 1, "t")
    node.replica.absorb()
    [group] = node.outgoing()
    node.replica.outgoing.mark_published(group.through)
    insert(node, 10, versions.ABSORB_ROWS, "t", "u")  # t's half alone fills a piece
    replica = node.replica
    with pytest.raises(apsw.FullError), replica.transaction():
        replica.absorbing.piece(None)
        raise apsw.FullError("at the commit")
    marking = Marking(replica)
    while marking.step():
        pass
    assert marking.marked == 1
    # In one group, not cut where the absorb that failed had come to.
    sent = node.outgoing()
    [whole] = [each for each in sent if len(each.group) >= versions.ABSORB_ROWS]
    assert len(whole.group) >= 2 * versions.ABSORB_ROWS
