"""Messages of a newer version: a hole until this node is upgraded, or merges a snapshot of one that could read them."""

from __future__ import annotations

import pytest

from harmonylite import wire
from harmonylite.db import sql, tables, unread
from harmonylite.db.copy import adopt_copy
from harmonylite.db.unread import OpenGroup, Rereading
from harmonylite.model import Group, Position, Undecodable, Unread
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, EPOCH_MS, STREAM, Node, stamp, wrote
from tests.db.snapshots import copy_of, merge

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
NEWER = b"\x09\x00what a later version writes"


def group(number: int, *ids: int, ts: int = EPOCH_MS + 1) -> Group:
    return wrote("t", ("id", "v"), *(((each, "theirs"), stamp(ts, 9)) for each in ids), number=number)


def joined(sequence: int, data: bytes) -> Undecodable:
    """A message that was joined, but not understood."""
    return Undecodable(sequence, data, "message format 9 is unknown", Unread(EPOCH_MS, 9, joined=True))


def message(sequence: int, data: bytes, publisher: int = 9) -> Undecodable:
    """A message of which not even the header was understood."""
    return Undecodable(sequence, data, "part header version 2 is unknown", Unread(EPOCH_MS, publisher, joined=False))


def parts(number: int, *ids: int) -> list[bytes]:
    payload = wire.encode_group(group(number, *ids), compress=False)
    return wire.split(payload, publisher=9, number=number, max_bytes=80, max_ts=0)


def kept(node: Node) -> list[int]:
    found = node.query(f"SELECT sequence, length(data) FROM {tables.UNREAD} ORDER BY 1")
    counted = node.replica.completeness
    assert (counted.unread_messages, counted.unread_bytes) == (len(found), sum(size for _, size in found))
    return [sequence for sequence, _ in found]


def read_again(node: Node) -> list[OpenGroup]:
    """As after the start of a version that has not tried them."""
    assert Rereading.due(node.replica)
    rereading = Rereading(node.replica)
    while rereading.step():
        pass
    left = rereading.open_groups()
    rereading.finish()
    assert not Rereading.due(node.replica)
    return left


def test_a_newer_message_is_a_hole_and_a_damaged_one_is_none(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.deliver((), [Undecodable(1, b"junk", "not a part")])
    assert node.replica.completeness.incomplete is None
    assert copy_of(node)[1].incomplete is None
    node.deliver((), [joined(2, NEWER), joined(3, NEWER)])
    for _ in range(2):
        text = node.replica.completeness.incomplete
        assert text is not None
        assert "2 messages" in text
        assert "upgrade" in text
        assert copy_of(node)[1].incomplete == text, "what the copied view holds"
        node.crash()
    assert node.query(f"SELECT sequence FROM {tables.UNDECODABLE}") == [(1,)]


def test_a_message_that_comes_again_is_kept_once(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.deliver((), [joined(2, NEWER)])
    node.deliver((), [joined(2, NEWER)])
    assert kept(node) == [2]
    assert node.replica.completeness.unread_messages == 1


def test_what_a_node_that_is_never_upgraded_keeps_is_counted_and_told(
    make: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it is kept, whatever it takes; told each time that there is twice as much, not for every message."""
    node = make(1, PLAIN)
    for sequence in range(1, 8):
        node.deliver((), [joined(sequence, NEWER + bytes(1_000_000))])
    told = [record.fields["messages"] for record in caplog.records if hasattr(record, "fields")]
    assert told == [1, 2, 4]
    for _ in range(2):
        text = node.replica.completeness.incomplete
        assert text is not None
        assert "7 messages" in text
        assert text.endswith("until then they stay in its database, 7 MB by now")
        assert kept(node) == [1, 2, 3, 4, 5, 6, 7]
        node.crash()
    merge(node, copy_of(make(2, PLAIN)))
    assert len(kept(node)) == 7, "that snapshot has nothing of this stream"
    node.replica.completeness.declare_complete()
    assert kept(node) == []


def test_a_number_that_the_log_gives_out_again_is_another_message(make: MakeNode) -> None:
    """It lost its end; what that held, its publisher sends again."""
    node = make(1, PLAIN)
    node.deliver((), [joined(2, wire.encode_group(group(1, 1), compress=False))])
    node.replica.move_position(Position(STREAM, CREATED, 1))
    node.deliver((), [joined(2, wire.encode_group(group(2, 2), compress=False))])
    read_again(node)
    assert node.rows("t") == [(2, "theirs")]


def test_after_an_upgrade_they_take_effect_by_version(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.clock.now_ms = EPOCH_MS + 5
    node.app.execute("INSERT INTO t VALUES (2, 'mine')")
    late = wire.encode_group(group(1, 1, 2), compress=True)
    ahead = wire.encode_group(group(2, 3, ts=EPOCH_MS + 10**9), compress=True)
    node.deliver((), [joined(1, late), joined(2, ahead)])
    assert node.rows("t") == [(2, "mine")]
    assert read_again(node.crash()) == []
    assert node.rows("t") == [(1, "theirs"), (2, "mine"), (3, "theirs")]
    version = node.version("t", 3)
    assert version is not None
    assert version.ts == EPOCH_MS + 60_000, "bounded by the time the message was stored at"
    assert kept(node) == []
    assert node.replica.completeness.incomplete is None
    assert node.crash().replica.completeness.incomplete is None


def test_what_is_still_not_understood_waits_for_the_next_version(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make(1, PLAIN)
    node.deliver((), [joined(1, NEWER), message(2, b"HL\x02" + bytes(80))])
    read_again(node)
    assert kept(node) == [1, 2]
    assert node.replica.completeness.unread_messages == 2
    assert not Rereading.due(node.crash().replica), "this version has tried"
    monkeypatch.setattr(unread, "__version__", "99.0")
    assert Rereading.due(node.replica)


def test_what_turns_out_to_be_damaged_is_passed_over(make: MakeNode) -> None:
    node = make(1, PLAIN)
    good = wire.encode_group(group(1, 1), compress=False)
    [foreign] = wire.split(good, publisher=9, number=1, max_bytes=1000, max_ts=0)
    node.deliver((), [joined(1, good[:-3]), message(2, foreign, publisher=8)])
    assert read_again(node) == []
    assert kept(node) == []
    assert node.replica.completeness.incomplete is None
    assert node.query(f"SELECT sequence FROM {tables.UNDECODABLE} ORDER BY 1") == [(1,), (2,)]
    assert node.rows("t") == []


def test_groups_in_several_messages(make: MakeNode) -> None:
    """Joined as they would have been; one that its publisher gave up goes, and so do copies of messages."""
    node = make(1, PLAIN)
    given_up, whole = parts(1, 1, 2), parts(2, 3, 4)
    assert len(whole) > 2
    stream = [given_up[0], whole[0], *whole[1:], whole[1]]
    node.deliver((), [message(1 + index, data) for index, data in enumerate(stream)])
    assert read_again(node) == []
    assert node.rows("t") == [(3, "theirs"), (4, "theirs")]
    assert kept(node) == []


def test_a_group_whose_other_messages_are_still_in_the_stream(make: MakeNode) -> None:
    """The upgrade came in the middle of it: it is read again from its first message."""
    node = make(1, PLAIN)
    payload = wire.encode_group(group(1, 7), compress=False)
    [single] = wire.split(payload, publisher=9, number=1, max_bytes=999, max_ts=0)
    begun = parts(2, 3, 4)[:2]
    node.deliver((), [message(5, single), message(6, begun[0]), message(7, begun[1])])
    (left,) = read_again(node)
    assert (left.stream, left.created, left.first) == (STREAM, CREATED, 6)
    assert node.rows("t") == [(7, "theirs")]
    assert kept(node) == [6, 7]
    assert node.replica.completeness.incomplete is not None
    Rereading(node.replica).go_back(left, Position(STREAM, CREATED, 5))
    assert kept(node) == []
    assert node.replica.completeness.incomplete is None
    assert node.replica.position(STREAM) == Position(STREAM, CREATED, 5)


def test_parts_of_a_format_that_is_still_not_understood_stay(make: MakeNode) -> None:
    node = make(1, PLAIN)
    pieces = wire.split(NEWER * 10, publisher=9, number=1, max_bytes=80, max_ts=0)
    node.deliver((), [message(1 + index, data) for index, data in enumerate(pieces)])
    assert read_again(node) == []
    assert kept(node) == list(range(1, len(pieces) + 1))


def test_a_locked_database_loses_nothing(make: MakeNode) -> None:
    node = make(1, PLAIN)
    pieces = parts(1, 1, 2)
    node.deliver((), [message(1 + index, data) for index, data in enumerate(pieces)])
    rereading = Rereading(node.replica)
    node.writer.setbusytimeout(0)
    refused = 0
    for _ in pieces:
        node.app.execute("BEGIN IMMEDIATE")
        try:
            rereading.step()
        except unread.apsw.BusyError:
            refused += 1
            node.app.execute("COMMIT")
            rereading.step()
        else:
            node.app.execute("COMMIT")
    assert refused == 1, "only the last one completes the group"
    assert not rereading.step()
    rereading.finish()
    assert node.rows("t") == [(1, "theirs"), (2, "theirs")]
    assert kept(node) == []


def test_the_snapshot_of_a_node_that_could_read_them_fills_the_hole(make: MakeNode) -> None:
    old, new = make(1, PLAIN), make(2, PLAIN)
    new.apply(group(1, 1), group(2, 2))
    old.deliver((), [joined(2, NEWER), joined(9, NEWER)])
    merge(old, copy_of(new))
    assert kept(old) == [9], "that one is beyond the snapshot"
    new.apply(*[group(number, number) for number in range(3, 10)])
    merge(old, copy_of(new))
    assert kept(old) == []
    assert old.replica.completeness.incomplete is None


def test_what_the_snapshots_node_could_not_read_waits_here_too(make: MakeNode) -> None:
    taker, behind, ahead = make(1, PLAIN), make(2, PLAIN), make(3, PLAIN)
    taker.apply(group(1, 1))
    data = wire.encode_group(group(2, 2), compress=False)
    taker.deliver((), [joined(2, data)])
    behind.apply(group(1, 1))
    ahead.apply(group(1, 1), group(2, 2), group(3, 3))
    snapshot = copy_of(taker)
    for node in (behind, ahead):
        assert not Rereading.due(node.replica)
        merge(node, snapshot)
    assert kept(ahead) == [], "it has read that message"
    assert kept(behind) == [2]
    assert behind.replica.completeness.incomplete is not None
    assert read_again(behind) == [], "it may know the format"
    assert behind.rows("t") == [(1, "theirs"), (2, "theirs")]


def test_an_adopted_copy_keeps_them(make: MakeNode) -> None:
    taker = make(1, PLAIN)
    taker.deliver((), [joined(2, wire.encode_group(group(2, 2), compress=False))])
    path, _ = copy_of(taker)
    adopt_copy(path, 5)
    fresh = Node(path, 5).start()
    assert read_again(fresh) == []
    assert fresh.rows("t") == [(2, "theirs")]
    fresh.stop()
    fresh.app.close()


def test_the_operator_may_give_them_up(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.deliver((), [joined(2, NEWER)])
    node.replica.completeness.note_hole("stream changes-1: messages 3 to 5 were discarded")
    assert "3 to 5" in (node.crash().replica.completeness.incomplete or "")
    node.replica.completeness.declare_complete()
    assert node.replica.completeness.incomplete is None
    assert node.crash().replica.completeness.incomplete is None
    assert node.query(f"SELECT sequence, data FROM {tables.UNDECODABLE}") == [(2, NEWER)]


def test_a_hole_lasts_until_a_snapshot_was_merged(make: MakeNode) -> None:
    node, other = make(1, PLAIN), make(2, PLAIN)
    node.app.execute("INSERT INTO t VALUES (1, 'mine')")
    other.apply(group(1, 3))
    node.replica.completeness.note_hole("stream changes-1: messages 3 to 5 were discarded")
    node.crash()
    assert copy_of(node)[1].incomplete is not None
    merge(node, copy_of(other))
    assert node.replica.completeness.incomplete is None
    assert node.crash().replica.completeness.incomplete is None


@pytest.mark.parametrize(
    ("at", "created", "is_filled"), [(4, CREATED, False), (5, CREATED, True), (2, "2023-11-15T00:00:00Z", True)]
)
def test_a_hole_is_filled_by_a_snapshot_from_behind_it(make: MakeNode, at: int, created: str, is_filled: bool) -> None:
    """In the middle of a stream: an older snapshot may be one to go on from, but not have what was missed. The node of
    one of another log has missed nothing in that."""
    node, other = make(1, PLAIN), make(2, PLAIN)
    node.apply(group(1, 9))
    other.apply(group(1, 1))
    other.replica.move_position(Position(STREAM, created, at))
    node.replica.completeness.note_hole("message 6 came", Position(STREAM, CREATED, 5))
    node.crash()
    assert node.replica.completeness.hole_ends == (Position(STREAM, CREATED, 5),)
    merge(node, copy_of(other))
    assert (node.replica.completeness.hole == "") == is_filled
    assert (node.crash().replica.completeness.hole_ends == ()) == is_filled


def test_a_snapshot_of_a_log_that_was_made_anew_says_nothing_of_the_old_one(make: MakeNode) -> None:
    """Its node may never have seen that message, and nobody else may have it any more."""
    old, new = make(1, PLAIN), make(2, PLAIN)
    old.deliver((), [joined(2, wire.encode_group(group(2, 2), compress=False))])
    new.apply(group(1, 1))
    new.replica.move_position(Position(STREAM, "2023-11-15T00:00:00Z", 40))
    merge(old, copy_of(new))
    assert kept(old) == [2]
    assert read_again(old) == []
    assert old.rows("t") == [(1, "theirs"), (2, "theirs")]


def test_a_read_that_failed_is_done_again(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that stumbles once: what follows must not count as tried."""
    node = make(1, PLAIN)
    node.deliver((), [joined(each, wire.encode_group(group(each, each), compress=False)) for each in (1, 2, 3)])
    rereading = Rereading(node.replica)
    assert rereading.step()
    read = sql.rows

    def stumbles(*_: object) -> None:
        monkeypatch.setattr(sql, "rows", read)
        raise unread.apsw.IOError("disk I/O error")

    monkeypatch.setattr(sql, "rows", stumbles)
    with pytest.raises(unread.apsw.IOError):
        rereading.step()
    while rereading.step():
        pass
    rereading.finish()
    assert node.rows("t") == [(1, "theirs"), (2, "theirs"), (3, "theirs")]
