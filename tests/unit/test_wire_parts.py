"""Payloads in parts: cut, joined, and given up when their publisher gave them up."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonylite.config import ConfigError, load
from harmonylite.wire import HEADER_BYTES, Joiner, Part, WireError, parse_part, split


def parts_of(payload: bytes, *, publisher: int = 7, number: int = 1, room: int = 10) -> list[Part]:
    messages = split(payload, publisher=publisher, number=number, max_bytes=HEADER_BYTES + room, max_ts=5)
    return [parse_part(message) for message in messages]


class Stream:
    """Numbers the messages as a stream does, one second after the other."""

    def __init__(self, joiner: Joiner) -> None:
        self.joiner = joiner
        self.sequence = 0

    def add(self, part: Part) -> bytes | None:
        self.sequence += 1
        return self.joiner.add(part, self.sequence, self.sequence * 1000)


@given(st.binary(max_size=300), st.integers(1, 400), st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1))
def test_split_and_join(payload: bytes, room: int, number: int, max_ts: int) -> None:
    messages = split(payload, publisher=2**64 - 1, number=number, max_bytes=HEADER_BYTES + room, max_ts=max_ts)
    assert all(len(message) <= HEADER_BYTES + room for message in messages)
    assert len(messages) == max(1, -(-len(payload) // room))
    stream = Stream(Joiner())
    results = []
    for index, message in enumerate(messages):
        part = parse_part(message)
        assert (part.publisher, part.number, part.index, part.count) == (2**64 - 1, number, index, len(messages))
        assert (part.total, part.crc32, part.max_ts) == (len(payload), zlib.crc32(payload), max_ts)
        results.append(stream.add(part))
    assert results == [None] * (len(messages) - 1) + [payload]
    assert type(results[-1]) is bytes
    assert (stream.joiner.open_groups, stream.joiner.open_bytes) == (0, 0)
    assert stream.joiner.first_open_sequence() is None


def test_split_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no room"):
        split(b"x", publisher=1, number=1, max_bytes=HEADER_BYTES, max_ts=0)
    with pytest.raises(WireError):
        split(b"x", publisher=-1, number=1, max_bytes=100, max_ts=0)
    with pytest.raises(WireError):
        split(b"x", publisher=1, number=1, max_bytes=100, max_ts=2**63)


@given(st.binary(max_size=80), st.sampled_from([b"", b"HL", b"HL\x01\x00"]))
def test_anything_else_is_not_a_part(data: bytes, prefix: bytes) -> None:
    try:
        part = parse_part(prefix + data)
    except WireError:
        return
    assert len(part.body) <= part.total and part.index < part.count


def test_broken_parts_are_refused() -> None:
    message = split(b"0123456789", publisher=1, number=1, max_bytes=HEADER_BYTES + 5, max_ts=0)[0]
    for broken in (b"", message[:-5], message[: HEADER_BYTES - 1], b"XX" + message[2:], message + b"123456"):
        with pytest.raises(WireError):
            parse_part(broken)
    for version, flags in ((2, 0), (1, 1)):
        with pytest.raises(WireError, match="upgrade"):
            parse_part(message[:2] + bytes((version, flags)) + message[4:])
    single = split(b"0123456789", publisher=1, number=1, max_bytes=100, max_ts=0)[0]
    for broken in (single[:-1], single + b"x"):
        with pytest.raises(WireError):
            parse_part(broken)


def test_parts_in_any_order_after_the_first() -> None:
    payload = bytes(range(100))
    first, *rest = parts_of(payload)
    random.Random(3).shuffle(rest)
    stream = Stream(Joiner())
    assert [stream.add(part) for part in (first, *rest)][-1] == payload


def test_publishers_interleaved() -> None:
    stream = Stream(Joiner())
    payloads = {p: bytes([p]) * 35 for p in (1, 2, 3)}
    parts = [part for p in payloads for part in parts_of(payloads[p], publisher=p)]
    random.Random(5).shuffle(parts)
    parts.sort(key=lambda part: part.index)
    done = [result for part in parts if (result := stream.add(part)) is not None]
    assert sorted(done) == sorted(payloads.values())
    assert stream.joiner.dropped == stream.joiner.late == 0


def test_first_open_sequence_is_where_the_oldest_open_group_began() -> None:
    stream = Stream(Joiner())
    one, two = parts_of(b"1" * 25, publisher=1), parts_of(b"2" * 25, publisher=2)
    assert stream.joiner.first_open_sequence() is None
    expected = [(one[0], 1), (two[0], 1), (one[1], 1), (one[2], 2), (two[1], 2), (two[2], None)]
    for part, first in expected:
        stream.add(part)
        assert stream.joiner.first_open_sequence() == first


def test_a_new_group_drops_the_publishers_open_one_only() -> None:
    stream = Stream(Joiner())
    old, other, new = parts_of(b"o" * 25), parts_of(b"x" * 25, publisher=8), parts_of(b"n" * 25, number=2)
    for part in (old[0], old[1], other[0], new[0]):
        assert stream.add(part) is None
    assert (stream.joiner.dropped, stream.joiner.open_groups) == (1, 2)
    assert stream.add(old[2]) is None
    assert stream.joiner.late == 1
    assert [stream.add(part) for part in new[1:]] == [None, b"n" * 25]
    assert [stream.add(part) for part in other[1:]] == [None, b"x" * 25]


def test_a_single_part_group_drops_the_open_one_too() -> None:
    stream = Stream(Joiner())
    stream.add(parts_of(b"o" * 25)[0])
    assert stream.add(parts_of(b"n", number=2)[0]) == b"n"
    assert (stream.joiner.dropped, stream.joiner.open_groups) == (1, 0)


def test_late_parts_do_not_tear_the_group_that_followed() -> None:
    """A publish that had timed out may be stored in the middle of the next group."""
    stream = Stream(Joiner())
    given_up, following = parts_of(b"g" * 25, number=5), parts_of(b"f" * 25, number=6)
    for part in (following[0], given_up[0], following[1], given_up[1]):
        assert stream.add(part) is None
    assert stream.add(following[2]) == b"f" * 25
    assert (stream.joiner.open_groups, stream.joiner.dropped) == (0, 1)


def test_parts_without_a_beginning_are_late() -> None:
    stream = Stream(Joiner())
    _, *rest = parts_of(b"x" * 45)
    assert [stream.add(part) for part in rest] == [None] * 4
    assert (stream.joiner.late, stream.joiner.open_groups) == (4, 0)


def test_copies_of_parts_are_ignored_while_open_and_afterwards() -> None:
    stream = Stream(Joiner())
    parts = parts_of(b"x" * 25)
    results = [stream.add(part) for part in (parts[0], parts[0], parts[1], parts[0], parts[1], parts[2])]
    assert results == [None] * 5 + [b"x" * 25]
    assert stream.joiner.duplicates == 3
    assert [stream.add(part) for part in parts] == [None] * 3
    assert (stream.joiner.duplicates, stream.joiner.open_groups) == (6, 0)
    single = parts_of(b"s", number=2)[0]
    assert [stream.add(single), stream.add(single)] == [b"s", None]


def test_reading_again_from_an_earlier_position_yields_the_group_again() -> None:
    joiner = Joiner()
    parts = parts_of(b"x" * 25)
    single = parts_of(b"s", number=2)[0]
    for _ in range(2):
        results = [joiner.add(part, 10 + i, 1000 + i) for i, part in enumerate((*parts, single))]
        assert results == [None, None, b"x" * 25, b"s"]


def test_a_number_used_again_with_other_content() -> None:
    """A device restored from a backup counts its groups from an older number on."""
    stream = Stream(Joiner())
    before, after = parts_of(b"b" * 25, number=9), parts_of(b"a" * 25, number=9)
    for part in (before[0], before[1], after[0], before[2], after[1]):
        assert stream.add(part) is None
    assert stream.add(after[2]) == b"a" * 25
    assert (stream.joiner.dropped, stream.joiner.late) == (1, 1)
    assert stream.add(parts_of(b"lower", number=3)[0]) == b"lower"


def test_a_damaged_payload_is_refused_and_forgotten() -> None:
    stream = Stream(Joiner())
    parts = parts_of(b"x" * 25)
    parts[1] = replace(parts[1], body=memoryview(b"y" * 10))
    stream.add(parts[0])
    stream.add(parts[1])
    with pytest.raises(WireError, match="damaged"):
        stream.add(parts[2])
    assert (stream.joiner.open_groups, stream.joiner.open_bytes) == (0, 0)
    single = replace(parts_of(b"s", number=2)[0], crc32=1)
    with pytest.raises(WireError, match="damaged"):
        stream.add(single)
    assert [stream.add(part) for part in parts_of(b"x" * 25, number=3)][-1] == b"x" * 25


def test_an_old_open_group_expires() -> None:
    joiner = Joiner(open_limit_ms=60_000)
    old, other = parts_of(b"x" * 25), parts_of(b"z" * 25, publisher=9)
    joiner.add(old[0], 1, 1000)
    joiner.add(other[0], 2, 61_000)
    assert joiner.first_open_sequence() == 1
    joiner.add(other[1], 3, 61_001)
    assert (joiner.first_open_sequence(), joiner.dropped) == (2, 1)
    assert joiner.add(old[1], 4, 61_002) is None
    assert joiner.late == 1
    assert joiner.add(other[2], 5, 61_003) == b"z" * 25


def test_memory_is_bounded() -> None:
    joiner = Joiner(max_open_bytes=4000)
    with pytest.raises(WireError, match="more than the limit of 4000"):
        joiner.add(parts_of(bytes(5000), room=1000)[0], 1, 0)
    assert joiner.open_groups == 0
    with pytest.raises(WireError, match="in 60 parts"):  # small parts are not free
        joiner.add(parts_of(bytes(60), room=1)[0], 1, 0)
    for publisher in range(1, 9):
        joiner.add(parts_of(bytes(2000), publisher=publisher, room=1500)[0], publisher, 0)
        assert joiner.open_bytes <= 4000
    assert (joiner.open_groups, joiner.dropped, joiner.first_open_sequence()) == (8, 0, 1)
    assert joiner.add(parts_of(bytes(2000), publisher=2, room=1500)[1], 9, 0) == bytes(2000)


def test_the_largest_group_a_publisher_may_make_fits(tmp_path: Path) -> None:
    database = {"db_path": str(tmp_path / "app.db"), "node_id": 1}
    largest = load(None, {**database, "max_transaction_bytes": "128MB"}).max_transaction_bytes
    with pytest.raises(ConfigError, match="max_transaction_bytes"):
        load(None, {**database, "max_transaction_bytes": largest + 1})
    # The worst there is: Latin-1 letters, uncompressed, in messages of 4 KB.
    total = 2 * largest
    first = Part(7, 1, 0, -(-total // 4096), total, 0, 0, memoryview(bytes(4096)))
    assert Joiner().add(first, 1, 0) is None


def test_a_shelved_group_waits_until_it_is_the_oldest() -> None:
    stream = Stream(Joiner(max_open_bytes=400))
    one, two = parts_of(b"1" * 60, publisher=1, room=30), parts_of(b"2" * 60, publisher=2, room=30)
    three = parts_of(b"3" * 60, publisher=3, room=30)
    for part in (one[0], two[0], three[0]):  # two times 158 bytes are held, the third is shelved
        assert stream.add(part) is None
    assert stream.joiner.open_bytes == 2 * 158
    assert stream.add(three[1]) is None
    # All of it is in the stream, so it stays although its publisher goes on, and although time passes.
    assert stream.add(parts_of(b"s", publisher=3, number=2)[0]) == b"s"
    assert stream.add(three[1]) is None
    assert (stream.joiner.duplicates, stream.joiner.open_groups, stream.joiner.dropped) == (1, 3, 0)
    assert stream.add(two[1]) == b"2" * 60
    assert (stream.joiner.first_open_sequence(), stream.joiner.must_read_again) == (1, False)
    assert stream.joiner.add(parts_of(b"s", publisher=9)[0], 9, 4_000_000) == b"s"
    assert (stream.joiner.dropped, stream.joiner.first_open_sequence()) == (1, 3)
    assert stream.joiner.must_read_again


def test_a_shelved_group_without_an_end_is_dropped() -> None:
    joiner = Joiner(max_open_bytes=400, open_limit_ms=60_000)
    for publisher in (1, 2, 3):
        joiner.add(parts_of(bytes(60), publisher=publisher, room=30)[0], publisher, publisher)
    assert joiner.add(parts_of(b"s", publisher=3, number=2)[0], 4, 4) == b"s"
    assert (joiner.open_groups, joiner.dropped) == (2, 1)
    joiner.add(parts_of(bytes(60), publisher=4, room=30)[0], 5, 5)
    assert joiner.add(parts_of(b"s", publisher=9)[0], 6, 100_000) == b"s"
    assert (joiner.open_groups, joiner.dropped, joiner.open_bytes) == (0, 4, 0)
    assert not joiner.must_read_again


def test_a_group_of_a_number_used_again_leaves_the_shelved_one() -> None:
    stream = Stream(Joiner(max_open_bytes=400))
    before, after = parts_of(b"b" * 60, number=9, room=30), parts_of(b"a" * 60, number=9, room=30)
    blocking = [parts_of(bytes(60), publisher=publisher, room=30) for publisher in (1, 2)]
    for part in (blocking[0][0], blocking[1][0], *before, *after):
        assert stream.add(part) is None
    assert (stream.joiner.open_groups, stream.joiner.dropped) == (4, 0)


def test_parts_with_more_bytes_than_they_promised_are_refused() -> None:
    joiner = Joiner(max_open_bytes=1000)
    first, second, _ = parts_of(bytes(25))
    joiner.add(first, 1, 0)
    with pytest.raises(WireError, match="damaged"):
        joiner.add(replace(second, body=memoryview(bytes(24))), 2, 0)
    assert (joiner.open_groups, joiner.open_bytes) == (0, 0)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=8), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=200, deadline=None)
def test_with_little_memory_every_group_comes_in_few_rounds(
    counts: list[int], shuffle: random.Random, abandoned: bool
) -> None:
    """Three publishers, each with its groups one after the other; one of them ends in the middle of a group."""
    queues: dict[int, list[Part]] = {0: [], 1: [], 2: []}
    for number, count in enumerate(counts):
        queues[number % 3] += parts_of(bytes([number]) * 10 * count, publisher=number % 3, number=number)
    expected = {bytes([number]) * 10 * count for number, count in enumerate(counts)}
    if abandoned:
        queues[2] += parts_of(bytes(50), publisher=2, number=99)[:4]
    stream = []
    while left := [publisher for publisher in queues if queues[publisher]]:
        stream.append(queues[shuffle.choice(left)].pop(0))
    stream.append(parts_of(b"end", publisher=8)[0])  # comes after the time in which a group has to end
    times = [*range(1000, 1000 + len(stream) - 1), 10_000_000]
    found, start = set(), 0
    for _ in range(len(counts) + 2):
        joiner = Joiner(max_open_bytes=5 * 138)  # the largest group alone
        for sequence in range(start, len(stream)):
            found.add(joiner.add(stream[sequence], sequence, times[sequence]))
            assert joiner.open_bytes <= 5 * 138
            if joiner.must_read_again:
                break
        if not joiner.must_read_again:
            break
        begin = joiner.first_open_sequence()
        assert begin is not None and begin > start
        start = begin
    assert found - {None} == expected | {b"end"}
    assert joiner.first_open_sequence() is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 3)), max_size=60))
@settings(max_examples=300)
def test_whatever_arrives_only_whole_payloads_come_out(arrivals: list[tuple[int, int, int]]) -> None:
    stream = Stream(Joiner(open_limit_ms=20_000, max_open_bytes=1500))
    payloads = {(p, n): bytes([p, n]) * 20 for p in range(3) for n in range(1, 4)}
    for publisher, number, index in arrivals:
        parts = parts_of(payloads[publisher, number], publisher=publisher, number=number)
        result = stream.add(parts[index])
        assert result in (None, payloads[publisher, number])
        first = stream.joiner.first_open_sequence()
        assert (first is None) == (stream.joiner.open_groups == 0)
        assert first is None or first <= stream.sequence
        assert 0 <= stream.joiner.open_bytes <= 1500
        assert stream.joiner.open_bytes > 0 or stream.joiner.open_groups == 0 or stream.joiner.must_read_again
