"""Who waits for a snapshot asks a costly store less and less often, and at once when one is being made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonylite.snapshot import listing
from harmonylite.snapshot.listing import EARLY_S, LONGEST_S, Listing
from harmonylite.snapshot.stores.base import StoreUnavailable
from tests.unit.snapshot_fakes import FakeLink, Lease, Store, stream

LOOK_S = 3.0


class Waiter:
    """Looks every three seconds, by a clock of its own."""

    def __init__(self, folder: Path, *, costly: bool = True) -> None:
        self.store, self.lease = Store(folder, costly=costly), Lease()
        self.link = FakeLink(self.store, self.lease, lambda: stream(1, 2))
        self.listing = Listing()
        self.now = 1_000.0

    def wait(self, seconds: float) -> int:
        """How many lists that took."""
        before = self.store.lists
        until = self.now + seconds
        while self.now < until:
            try:
                asyncio.run(self.listing.manifests(self.link))
            except StoreUnavailable as error:
                assert str(error) == "away"
            self.now += LOOK_S
        return self.store.lists - before

    def looks_until_listed(self) -> int:
        before = self.store.lists
        for looks in range(100):
            if self.store.lists > before:
                return looks
            self.wait(LOOK_S)
        raise AssertionError("never")


@pytest.fixture
def waiter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiter]:
    it = Waiter(tmp_path)
    monkeypatch.setattr(listing.time, "monotonic", lambda: it.now)
    yield it


@pytest.mark.parametrize("away", [False, True], ids=["it holds none of use", "it is away"])
def test_the_pauses_grow_to_a_minute(waiter: Waiter, away: bool) -> None:
    waiter.store.trouble = StoreUnavailable("away") if away else None
    assert waiter.wait(EARLY_S) == EARLY_S / LOOK_S, "a snapshot for a new device takes no longer"
    assert waiter.wait(300) <= 15
    assert waiter.wait(3600) == pytest.approx(3600 / LONGEST_S, abs=4)


def test_what_costs_nothing_is_asked_at_every_look(waiter: Waiter) -> None:
    waiter.store.costly = False
    assert waiter.wait(600) == 600 / LOOK_S


def test_a_snapshot_that_is_being_made_is_seen_at_once(waiter: Waiter) -> None:
    waiter.wait(1_000)
    waiter.lease.others = 7
    assert waiter.looks_until_listed() == 1, "somebody takes one"
    waiter.wait(1_000)  # storing it takes long
    waiter.lease.others = None
    assert waiter.looks_until_listed() == 1, "it is there"


def test_who_waits_again_later_begins_anew(waiter: Waiter) -> None:
    waiter.wait(1_000)
    waiter.now += 4 * LONGEST_S
    assert waiter.wait(EARLY_S) == EARLY_S / LOOK_S


def test_what_could_not_be_fetched_is_not_tried_at_every_look(waiter: Waiter) -> None:
    waiter.wait(1_000)
    waiter.looks_until_listed()
    waiter.listing.failed(StoreUnavailable("away"))
    with pytest.raises(StoreUnavailable, match="away"):
        asyncio.run(waiter.listing.manifests(waiter.link))
    waiter.wait(2 * LONGEST_S)
    assert asyncio.run(waiter.listing.manifests(waiter.link)) == []
