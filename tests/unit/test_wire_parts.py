"""Payloads in parts: cut, joined, and given up when their publisher gave them up."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert (joiner.open_groups, joiner.dropped, joiner.first_open_sequence()) == (2, 6, 7)
    assert joiner.add(parts_of(bytes(2000), publisher=8, room=1500)[1], 9, 0) == bytes(2000)


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
        assert (stream.joiner.open_bytes == 0) == (stream.joiner.open_groups == 0)
