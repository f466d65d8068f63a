"""Take everything of ours out of a database again (`harmonylite cleanup`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harmonylite.db import capture, install, recapture, sql, tables, versions


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """tables: how many were captured; absorbed: log rows taken over; pending: rows that were never published."""

    tables: int
    absorbed: int
    pending: int


class CleanupRefused(Exception):  # noqa: N818 - the name is part of the interface
    """Rows would be lost."""


def cleanup(path: Path, *, everything: bool, force: bool) -> CleanupReport:
    """Remove our triggers and change logs after absorbing them; `everything`: every table of ours.

    Raises CleanupRefused when `everything` would drop unpublished changes and `force` is not given.
    """
    connection = sql.open_writer(path)
    try:
        with sql.write_transaction(connection):
            if tables.META.strip('"') not in capture.installed(connection).tables:
                return CleanupReport(0, 0, 0)
            node_id = tables.get_meta(connection, "node_id")
            before = tables.load_state(connection)
            settings = install.Settings(node_id if isinstance(node_id, int) else 0, False, (), ())
            logged = versions.count_logged_anywhere(connection)
            begun = recapture.load(connection)
            schema, state, _ = install.install(connection, settings, before)
            tables.save_state(connection, before, state)
            pending = versions.count_pending(connection, schema, state.published_batch)
            if everything and begun and not force:
                raise CleanupRefused(
                    f"table {begun[0].table} was rebuilt, or is new: which of its rows were never published is not yet"
                    " known; start the daemon and let it publish them, or use --force"
                )
            if everything and pending and not force:
                raise CleanupRefused(
                    f"{pending} changed rows were never published and would be forgotten; start the daemon and let it"
                    " publish them, or use --force"
                )
            return CleanupReport(install.uninstall(connection, everything=everything), logged, pending)
    finally:
        connection.close()
