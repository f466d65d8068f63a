"""Rows and steps that the histories of several rules begin with."""

from __future__ import annotations

from tests.sim.history import Insert, Step, Sync, Write


def row(key: int, note: str) -> Insert:
    """A row of a table with a single integer key, whatever was there."""
    return Insert("counter", (key,), (("note", note),), "OR REPLACE")


def mail(key: int, address: str, table: str = "one_unique") -> Insert:
    """A row of a table in which addresses are unique."""
    return Insert(table, (key,), (("email", address), ("note", None)), "OR REPLACE")


# All three nodes have read one row.
KNOWN: tuple[Step, ...] = (Write(0, (row(1, "known"),)), Sync(0), Sync(1), Sync(2))
