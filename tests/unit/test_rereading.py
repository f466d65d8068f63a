"""After an upgrade: messages of a newer version are read again, those that only the stream still has too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from harmonylite import rereading, wire
from harmonylite.model import Delivery, Group, Position, Stamp, TableChanges, Undecodable, Unread
from harmonylite.rereading import read_again
from harmonylite.stream.lineage import INTACT, Lineage
from harmonylite.stream.log import LogSettings
from tests.unit.snapshot_fakes import CREATED, STREAM, Node, opened, stream

NOW_MS = 1_700_000_000_000
SETTINGS = LogSettings(node_id=1)


def messages(number: int, *ids: int) -> list[bytes]:
    rows = [(each, "theirs") for each in ids]
    changes = TableChanges("t", ("id",), ("id", "v"), rows, [Stamp(NOW_MS, 9, 0, 0, 0)] * len(ids))
    payload = wire.encode_group(Group(9, number, (changes,)), compress=False)
    return wire.split(payload, publisher=9, number=number, max_bytes=90, max_ts=0)


async def pass_over(node: Node, *data: bytes, first: int = 5) -> None:
    """As a version does that does not know the header."""
    unread = tuple(
        Undecodable(first + index, each, "part header version 2 is unknown", Unread(NOW_MS, 9, joined=False))
        for index, each in enumerate(data)
    )
    end = first + len(data) - 1
    await node.engine.apply(Delivery(Position(STREAM, CREATED, end, end * 1_000), (), unread))


def log_is(monkeypatch: pytest.MonkeyPatch, lineage: Lineage) -> None:
    async def state(*_: object) -> Any:
        return stream(1, 100)

    async def same(*_: object) -> Lineage:
        return lineage

    async def stored_ns(_client: object, _settings: object, _state: object, sequence: int) -> int:
        return sequence * 1_000

    monkeypatch.setattr(rereading, "stream_state", state)
    monkeypatch.setattr(rereading, "same_log", same)
    monkeypatch.setattr(rereading, "stored_time_ns", stored_ns)


async def again(node: Node) -> None:
    await read_again(node.engine, cast(Any, None), SETTINGS)


def run_upgraded(
    folder: Path, data: Sequence[bytes], created: str = CREATED
) -> tuple[dict[int, str], Position | None, str | None]:
    """Rows, position and what is missing, after a start of the version that knows these messages."""

    async def main() -> tuple[dict[int, str], Position | None, str | None]:
        async with opened(folder) as node:
            await pass_over(node, *data)
            assert node.rows() == {}
            if created != CREATED:
                await node.at(3, created)
        async with opened(folder) as node:
            await again(node)
            await again(node)
            return node.rows(), await node.engine.position(STREAM), node.engine.replica.completeness.incomplete

    return asyncio.run(main())


def test_what_was_kept_takes_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_is(monkeypatch, INTACT)
    rows, position, incomplete = run_upgraded(tmp_path, messages(1, 1, 2))
    assert rows == {1: "theirs", 2: "theirs"}
    assert position is not None
    assert position.sequence > 5
    assert incomplete is None


def test_a_group_that_was_kept_in_part_is_read_from_its_first_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_is(monkeypatch, INTACT)
    _, position, incomplete = run_upgraded(tmp_path, messages(1, 1, 2)[:-1])
    assert position == Position(STREAM, CREATED, 4, 4_000), "the lineage is known there too"
    assert incomplete is None


def test_a_broken_log_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back would hide that messages after it are gone."""
    log_is(monkeypatch, Lineage(False, "message 6 is another one than before"))
    begun = messages(1, 1, 2)[:-1]
    _, position, incomplete = run_upgraded(tmp_path, begun)
    assert position is not None
    assert position.sequence == 4 + len(begun)
    assert incomplete is not None


def test_the_rest_of_a_group_in_a_stream_that_is_gone_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_is(monkeypatch, INTACT)
    _, position, incomplete = run_upgraded(tmp_path, messages(1, 1, 2)[:-1], created="2026-11-25T00:00:00Z")
    assert position is not None
    assert position.sequence == 3
    assert incomplete is None


def test_a_log_that_lost_its_end_is_not_read_on_behind_what_it_holds_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are given out again: going back to the group's first message would be going on, past others."""
    log_is(monkeypatch, INTACT)

    async def main() -> None:
        async with opened(tmp_path) as node:
            await pass_over(node, *messages(1, 1, 2)[:-1], first=80)
            await node.at(50)
        async with opened(tmp_path) as node:
            await again(node)
            assert await node.position() == 50
            assert node.engine.replica.completeness.incomplete is None

    asyncio.run(main())


def test_what_had_to_wait_for_a_gap_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this node would ask to be upgraded, and take no snapshot, for ever."""

    async def main() -> None:
        async with opened(tmp_path) as node:
            await pass_over(node, *messages(1, 1, 2)[:-1])
        async with opened(tmp_path) as node:
            log_is(monkeypatch, Lineage(False, "the stream was created anew"))
            await again(node)
            assert node.engine.replica.completeness.incomplete is not None
            await node.at(3, "2026-11-25T00:00:00Z")
            log_is(monkeypatch, INTACT)
            await again(node)
            assert node.engine.replica.completeness.incomplete is None
            assert await node.position() == 3

    asyncio.run(main())
