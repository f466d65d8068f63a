"""Groups and values survive the wire exactly; whatever else arrives raises WireError and nothing else."""

from __future__ import annotations

import itertools
import math
import random
import struct
import threading
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmonylite.model import Group, RawText, Stamp, TableChanges
from harmonylite.wire import WireError, decode_group, encode_group, pack, unpack
from harmonylite.wire.columns import OFFSETS, PLAIN, SAME, STEPS, decode_column, encode_column

I64_MIN, I64_MAX = -(2**63), 2**63 - 1

integers = st.integers(I64_MIN, I64_MAX) | st.sampled_from([I64_MIN, I64_MAX, -1, 0, 1, 255, 256, 65535, 65536, 2**32])
floats = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, 5e-324])
texts = st.text(max_size=20)
values = st.one_of(integers, floats, texts, st.binary(max_size=20), st.binary(max_size=8).map(RawText), st.none())
nested = st.recursive(
    values, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def exactly(value: object) -> str:
    """Unlike ==, tells 1 from 1.0 and True, 0.0 from -0.0, RawText from bytes."""
    return repr(value)


def plain(group: Group) -> str:
    """A group as text, whatever sequence types its rows stand in."""
    tables = [
        (t.table, t.key, t.columns, list(t.rows), list(t.row_stamps), list(t.deleted), list(t.deleted_stamps))
        for t in group.tables
    ]
    return exactly((group.publisher, group.number, tables))


def one_table(rows: list[tuple[Any, ...]], columns: tuple[str, ...] = ("id", "v"), **more: Any) -> Group:
    stamps = [Stamp(1_715_000_000_000 + i, 7, 0, 0, 0) for i in range(len(rows))]
    return Group(7, 1, (TableChanges("t", columns[:1], columns, rows, stamps, **more),))


# --- single values ---------------------------------------------------------------------------------------------


@given(nested)
def test_pack_keeps_storage_classes(value: object) -> None:
    assert exactly(unpack(pack(value))) == exactly(value)


def test_pack_turns_tuples_into_lists_also_inside() -> None:
    assert unpack(pack((1, ("a", b"b"), {"c": (None,)}))) == [1, ["a", b"b"], {"c": [None]}]


@pytest.mark.parametrize(
    "value",
    [
        True,
        2**63,
        I64_MIN - 1,
        2**64,
        math.nan,
        {1: "a"},
        {b"a": 1},
        {1, 2},
        object(),
        "\ud800",
        [[False]],
        msgpack.ExtType(1, b"x"),
    ],
    ids=lambda value: "object" if type(value) is object else repr(value),  # an address is another in each process
)
def test_pack_refuses_what_sqlite_cannot_hold(value: object) -> None:
    with pytest.raises(WireError):
        pack(value)


def test_pack_works_after_a_refusal() -> None:
    with pytest.raises(WireError):
        pack([1, "half of it is packed by now", "\ud800"])
    assert unpack(pack([2])) == [2]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb(True),
        msgpack.packb(2**63),
        msgpack.packb(math.nan),
        msgpack.packb({1: 2}),
        msgpack.packb({b"a": 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\xa1\xff",  # text that is not UTF-8 must not pass as str
        msgpack.packb(1) + b"\x00",
        b"\xdd\xff\xff\xff\xff",  # an array that claims 4 billion items
        b"\x81\x90\x01",  # a list as a map's key
        b"\x91" * 100_000 + b"\x01",
    ],
    ids=lambda data: data[:12].hex(),
)
def test_unpack_refuses_what_pack_would_not_make(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack(data)


def test_deep_nesting_is_refused_when_packed() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(WireError):
        pack(value)


@given(st.binary(max_size=64))
def test_unpack_of_anything_raises_nothing_but_wire_error(data: bytes) -> None:
    try:
        value = unpack(data)
    except WireError:
        return
    assert exactly(unpack(pack(value))) == exactly(value)


# --- columns ---------------------------------------------------------------------------------------------------

column_shapes = st.one_of(
    st.lists(values, min_size=1, max_size=40),
    st.lists(integers, min_size=1, max_size=40),
    st.lists(st.integers(-200, 200), min_size=1, max_size=40),
    st.lists(integers | st.none(), min_size=1, max_size=40),
    st.builds(lambda value, n: [value] * n, values, st.integers(1, 40)),
    st.builds(
        lambda first, step, n: [first + i * step for i in range(n)],
        st.integers(-(2**40), 2**40),
        st.integers(-(2**40), 2**40),
        st.integers(1, 40),
    ),
    # Small steps with a leap beyond the part of the column that the encoder samples.
    st.builds(
        lambda first, leap, n: [first + i + (leap if i > 20 else 0) for i in range(n)],
        st.integers(-(2**60), 2**60),
        st.integers(-(2**62), 2**62),
        st.integers(8, 60),
    ),
    st.lists(st.sampled_from([0.0, -0.0]), min_size=8, max_size=12),
)


@given(column_shapes, st.booleans())
@settings(max_examples=400)
def test_a_column_survives(column: list[Any], key: bool) -> None:
    encoded = msgpack.unpackb(pack(encode_column(column, key=key)), ext_hook=lambda _, data: RawText(data))
    assert exactly(decode_column(encoded, len(column))) == exactly(column)
    if key:
        assert encoded[0] != SAME


@pytest.mark.parametrize("first", [I64_MIN, I64_MAX])
def test_extremes_of_a_whole_column(first: int) -> None:
    for column in ([first] * 10, [I64_MIN, I64_MAX] * 5, [first, 0] * 5):
        assert decode_column(encode_column(column, key=True), 10) == column


def test_the_kind_follows_the_values() -> None:
    assert encode_column(list(range(1000, 1100)), key=True)[0] == STEPS
    assert encode_column([i % 7 for i in range(100)], key=False)[0] == OFFSETS
    assert encode_column(["x"] * 100, key=False) == [SAME, "x"]
    assert encode_column(["x"] * 100, key=True)[0] == PLAIN
    assert encode_column([1, 1.0] * 50, key=False)[0] == PLAIN


@pytest.mark.parametrize(
    "column",
    [
        None,
        [],
        [PLAIN],
        [PLAIN, None],
        [PLAIN, [True] * 3],
        [PLAIN, [2**63, 1, 1]],
        [PLAIN, [2**63, None, "a"]],
        [PLAIN, [math.nan, math.inf, 1.0]],
        [PLAIN, [math.inf, -math.inf, math.nan]],
        [PLAIN, [None, math.nan, None]],
        [PLAIN, [[], 1, 2]],
        [PLAIN, [1, 2]],
        [SAME, [1]],
        [SAME, 2**63],
        [OFFSETS, 0, 3, b"123"],
        [OFFSETS, 0, 2, b"123"],
        [OFFSETS, 0, 1, "123"],
        [OFFSETS, 0, True, b"123"],
        [OFFSETS, 0, 1],
        [OFFSETS, 0.0, 1, b"123"],
        [OFFSETS, None, 1, b"123"],
        [OFFSETS, I64_MAX, 1, b"\0\0\1"],
        [OFFSETS, 0, 8, struct.pack("<3Q", 1, 1, 2**63)],
        [OFFSETS, 2**63, 1, b"123"],
        [STEPS, I64_MAX, 1, b"\1\0"],
        [STEPS, I64_MIN, 1, b"\xff\0"],
        [STEPS, 5, 8, struct.pack("<2q", I64_MAX, 1)],
        [4, [1, 2, 3]],
        ["PLAIN", [1, 2, 3]],
        {"kind": 0},
    ],
    ids=repr,
)
def test_a_broken_column_is_refused(column: object) -> None:
    with pytest.raises(WireError):
        decode_column(column, 3)


def test_infinities_of_both_signs_are_not_taken_for_nan() -> None:
    assert decode_column([PLAIN, [math.inf, -math.inf]], 2) == [math.inf, -math.inf]


# --- groups ----------------------------------------------------------------------------------------------------

stamps = st.builds(Stamp, integers, st.integers(0, I64_MAX), st.integers(0, 1), integers, st.integers(0, I64_MAX))


@st.composite
def tables(draw: st.DrawFn) -> TableChanges:
    columns = tuple(draw(st.lists(texts, min_size=1, max_size=5, unique=True)))
    key = tuple(draw(st.lists(st.sampled_from(columns), min_size=1, unique=True)))
    rows = draw(st.lists(st.tuples(*[values] * len(columns)), max_size=20))
    deleted = draw(st.lists(st.tuples(*[values] * len(key)), max_size=20))
    return TableChanges(
        draw(texts),
        key,
        columns,
        rows,
        draw(st.lists(stamps, min_size=len(rows), max_size=len(rows))),
        deleted,
        draw(st.lists(stamps, min_size=len(deleted), max_size=len(deleted))),
    )


groups = st.builds(Group, st.integers(0, I64_MAX), st.integers(0, I64_MAX), st.lists(tables(), max_size=3).map(tuple))


@given(groups, st.booleans())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_group_survives(group: Group, compress: bool) -> None:
    assert plain(decode_group(encode_group(group, compress=compress))) == plain(group)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 300, 5000])
def test_rows_of_every_storage_class(count: int, compress: bool) -> None:
    rnd = random.Random(count)
    pool = [0, -1, I64_MIN, I64_MAX, 1.0, -0.0, math.inf, "", "straße\0日本", b"", b"\0\xff", RawText(b"\xff"), None]
    rows = [(i, rnd.random(), f"name {i % 10}", rnd.choice(pool), None) for i in range(count)]
    keys = [(f"k{i}", i) for i in range(count)]
    stamps = [Stamp(1_715_000_000_000 + i // 3, 7, i % 2, i, 5) for i in range(count)]
    group = Group(
        I64_MAX,
        12,
        (
            TableChanges("a", ("id",), ("id", "f", "name", "any", "nothing"), rows, stamps),
            TableChanges("b", ("x", "y"), ("y", "x"), [(1, "one")], stamps[:1], keys, stamps),
            TableChanges("empty", ("id",), ("id",)),
        ),
    )
    decoded = decode_group(encode_group(group, compress=compress))
    assert plain(decoded) == plain(group)
    for changes in decoded.tables:
        assert {type(row) for row in itertools.chain(changes.rows, changes.deleted)} <= {tuple}
        assert {type(stamp) for stamp in itertools.chain(changes.row_stamps, changes.deleted_stamps)} <= {Stamp}


def test_decodes_from_a_view_of_a_larger_buffer() -> None:
    group = one_table([(i, "x") for i in range(50)])
    data = encode_group(group, compress=True)
    assert plain(decode_group(memoryview(b"abc" + data)[3:])) == plain(group)


def test_compression_pays_or_is_left_out() -> None:
    one = one_table([(1, "a")])
    assert encode_group(one, compress=True) == encode_group(one, compress=False)
    noise = one_table([(1, random.Random(1).randbytes(5000))])
    assert encode_group(noise, compress=True) == encode_group(noise, compress=False)
    many = one_table([(i, f"customer {i % 50}") for i in range(1000)])
    assert len(encode_group(many, compress=True)) < len(encode_group(many, compress=False)) / 4


def test_ascending_keys_and_versions_cost_next_to_nothing() -> None:
    """4000 rows: id, timestamp and version of each would be 100 KB as plain numbers."""
    rows = [(100_000 + i, 1_715_000_000_000 + 100 * i) for i in range(4000)]
    assert len(encode_group(one_table(rows), compress=True)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        TableChanges("t", ("id",), ("id", "v"), [(1, 2)], []),
        TableChanges("t", ("id",), ("id", "v"), [], [Stamp(1, 1, 0, 0, 0)]),
        TableChanges("t", ("id",), ("id", "v"), [(1,)], [Stamp(1, 1, 0, 0, 0)]),
        TableChanges("t", ("id",), ("id", "v"), [(1, 2), (1, 2, 3)], [Stamp(1, 1, 0, 0, 0)] * 2),
        TableChanges("t", ("id",), ("id", "v"), [(1, True)], [Stamp(1, 1, 0, 0, 0)]),
        TableChanges("t", ("id",), ("id", "v"), [(1, 2**63)] * 9, [Stamp(1, 1, 0, 0, 0)] * 9),
        TableChanges("t", ("id",), ("id",), [], [], [(1, 2)], [Stamp(1, 1, 0, 0, 0)]),
        TableChanges("t", ("id",), ("id", "v"), [(1, "\ud800")], [Stamp(1, 1, 0, 0, 0)]),
        TableChanges("t", ("id",), ("id", "v"), [(1, [2])], [Stamp(1, 1, 0, 0, 0)]),
    ],
    ids=range(9),
)
def test_a_group_that_does_not_fit_together_is_not_encoded(changes: TableChanges) -> None:
    with pytest.raises(WireError):
        encode_group(Group(1, 1, (changes,)), compress=True)


def test_threads_do_not_disturb_each_other() -> None:
    """zstandard's and msgpack's objects are not thread-safe; ours are one per thread."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rnd = random.Random(seed)
        try:
            for _ in range(60):
                group = one_table([(rnd.randrange(10**9), f"{seed} {rnd.random()}") for _ in range(200)])
                assert plain(decode_group(encode_group(group, compress=True))) == plain(group)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- evolution -------------------------------------------------------------------------------------------------


def body_of(group: Group) -> Any:
    return msgpack.unpackb(encode_group(group, compress=False)[2:], strict_map_key=False)


def message(body: object) -> bytes:
    return b"\x01\x00" + msgpack.packb(body)


def test_an_unknown_format_says_so() -> None:
    data = encode_group(one_table([(1, 2)]), compress=False)
    with pytest.raises(WireError, match=r"format 2 is unknown.*upgrade"):
        decode_group(b"\x02" + data[1:])
    with pytest.raises(WireError, match=r"flags 0x2 are unknown.*upgrade"):
        decode_group(data[:1] + b"\x02" + data[2:])


def test_what_a_later_version_adds_is_ignored() -> None:
    group = one_table([(1, "a"), (2, "b")], deleted=[(3,)], deleted_stamps=[Stamp(1, 1, 0, 0, 0)])
    body = body_of(group)
    body[0]["new"] = {"some": [msgpack.ExtType(9, b"")]}
    table = body[0]["t"][0]
    table["new"] = None
    table["r"] += 1
    body.insert(1 + 2 + 5, [77, "a column kind of the future"])
    body.append("a trailing column")
    assert plain(decode_group(message(body))) == plain(group)


# --- hostile and broken messages -------------------------------------------------------------------------------


def refused(data: bytes, **limits: Any) -> None:
    with pytest.raises(WireError):
        decode_group(data, **limits)


def test_sizes_are_bounded() -> None:
    group = one_table([(i, "x" * 10) for i in range(1000)])
    for compress in (True, False):
        data = encode_group(group, compress=compress)
        refused(data, max_bytes=5000)
        decode_group(data, max_bytes=20_000)


def test_a_compression_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(50_000_000))
    assert len(bomb) < 10_000
    refused(b"\x01\x01" + bomb, max_bytes=1_000_000)


def test_a_frame_that_hides_or_fakes_its_size_is_refused() -> None:
    body = encode_group(one_table([(i, "x" * 100) for i in range(100)]), compress=False)[2:]
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(body)
    refused(b"\x01\x01" + hidden)
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(body))
    fake = zstandard.frame_content_size(bytes(frame)) + 1
    frame[5:7] = (fake - 256).to_bytes(2, "little")  # a two-byte size field counts from 256
    assert zstandard.frame_content_size(bytes(frame)) == fake
    refused(b"\x01\x01" + bytes(frame))


def test_columns_sent_once_cannot_claim_endless_rows() -> None:
    """Rows are counted by the key's column, which costs a byte each; the rest is held against max_bytes."""
    columns = [f"c{i}" for i in range(1000)]
    key = [OFFSETS, 0, 1, bytes(100_000)]
    table = {"t": "t", "k": ["c0"], "c": columns, "r": 1005}
    body = [{"p": 1, "n": 1, "t": [table]}, key, *[[SAME, 0]] * 1004]
    refused(message(body), max_bytes=10_000_000)
    refused(message([body[0], [SAME, 0], *body[2:]]))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body[0].pop("p"),
        lambda body: body[0].update(p=-1),
        lambda body: body[0].update(p=True),
        lambda body: body[0].update(n=2**63),
        lambda body: body[0].update(n="1"),
        lambda body: body[0].update(t={}),
        lambda body: body[0].update(t=[[]]),
        lambda body: body[0]["t"][0].update(t=b"t"),
        lambda body: body[0]["t"][0].update(t=None),
        lambda body: body[0]["t"][0].update(k=[]),
        lambda body: body[0]["t"][0].update(k=["other"]),
        lambda body: body[0]["t"][0].update(k=["id", "id"]),
        lambda body: body[0]["t"][0].update(k=[["id"]]),
        lambda body: body[0]["t"][0].update(c=["id", "id"]),
        lambda body: body[0]["t"][0].update(c=["id", 5]),
        lambda body: body[0]["t"][0].update(c=["id", "v", "w"]),
        lambda body: body[0]["t"][0].update(r=6),
        lambda body: body[0]["t"][0].update(r=-7),
        lambda body: body[0]["t"][0].update(r=8),
        lambda body: body[0]["t"][0].update(r=2**64 - 1),
        lambda body: body[0]["t"][0].update(r=7.0),
        lambda body: body[0]["t"][0].update(d=6),
        lambda body: body.pop(),
        lambda body: body.pop(0),
        lambda body: body.clear(),
        lambda body: body.__setitem__(2, [PLAIN, ["one too few"]]),
        lambda body: body.__setitem__(3, [PLAIN, [1, 1.0]]),
        lambda body: body.__setitem__(3, [SAME, "x"]),
        lambda body: body.__setitem__(3, [SAME, None]),
    ],
    ids=range(29),
)
def test_a_message_of_the_wrong_shape_is_refused(change: Any) -> None:
    body = body_of(one_table([(1, "a"), (2, "b")]))
    decode_group(message(body))
    change(body)
    refused(message(body))


@pytest.mark.parametrize("body", [None, 5, "x", {}, [None], [[]], {"p": 1}], ids=repr)
def test_a_message_without_a_head_is_refused(body: object) -> None:
    refused(message(body))


def only_wire_error(data: bytes) -> None:
    try:
        group = decode_group(data, max_bytes=1_000_000)
    except WireError:
        return
    assert isinstance(group, Group)
    encode_group(group, compress=False)  # what was accepted is a group in every respect


SAMPLES = [
    encode_group(group, compress=compress)
    for group in (
        one_table([(1, "a")]),
        one_table([(i, i * 3) for i in range(20)], deleted=[(5,)], deleted_stamps=[Stamp(1, 2, 0, 0, 0)]),
        one_table([(f"key {i}", None if i % 3 else i / 7) for i in range(80)]),
    )
    for compress in (True, False)
]


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x01\x00", b"\x01\x01", b"\x01\x01\x28\xb5\x2f\xfd"]))
@settings(max_examples=500)
def test_random_bytes(data: bytes, prefix: bytes) -> None:
    only_wire_error(prefix + data)


@pytest.mark.parametrize("data", SAMPLES, ids=range(len(SAMPLES)))
def test_truncated_anywhere(data: bytes) -> None:
    for end in range(len(data)):
        refused(data[:end])


@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=1500)
def test_flipped_bits(data: bytes, flips: list[tuple[int, int]]) -> None:
    broken = bytearray(data)
    for position, mask in flips:
        broken[position % len(broken)] ^= mask
    only_wire_error(bytes(broken))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([data for data in SAMPLES if data[1] == 0]), st.data())
@settings(max_examples=800)
def test_any_part_of_the_tree_replaced(data: bytes, draw: st.DataObject) -> None:
    """Well-formed msgpack of a wrong shape gets deeper into the decoder than flipped bits do."""
    body = msgpack.unpackb(data[2:])
    place = body
    while True:
        at = draw.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[at]
        if not isinstance(inner, (list, dict)) or not inner or draw.draw(st.booleans()):
            break
        place = inner
    place[at] = draw.draw(anything)
    only_wire_error(message(body))
