"""The write-ahead log is copied into the database by this process, and not by the application's next commit.

SQLite has whoever commits do that, once the log has 1000 pages (https://sqlite.org/wal.html#automatic_checkpoint): with
two waits for the disk, for pages that were mostly ours. Copying by ourselves does not help as long as the application
commits meanwhile: then the log has more again, and its commit goes on with it. But nobody copies more than the oldest
reader has seen. So while we write much, a reader of our own stands where we copied to last (the guard), and goes on
when we copy again: meanwhile the application finds nothing to copy. The log can begin afresh only once the guard is
gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Final

import apsw

from harmonylite.db import sql

log = logging.getLogger(__name__)

# Before the application's connections do, at 1000.
COPY_PAGES: Final = 900
# The guard stands when a transaction of ours wrote so many pages, or the log has so many: also when all are copied, as
# long as somebody reads them, the log goes on, and the application's commits would copy every few pages.
MANY_PAGES, SOON_PAGES = 50, 500
# The guard leaves the log alone when it could not be copied to its end before it had so many pages, 32 MB usually: an
# application that commits while we wait for the disk has to wait for it now and then itself, as it does without us.
MOST_PAGES: Final = 8_000

# Changes with every commit of any other connection.
_DATA_VERSION: Final = "PRAGMA data_version"

# Where the log's header has the numbers that change when it begins afresh (https://sqlite.org/fileformat2.html#walformat)
_SALTS: Final = 16

# By device and inode. Never closed: that would take away all locks of this process on the file, SQLite's too
# (https://sqlite.org/howtocorrupt.html, 2.2).
_descriptors: Final[dict[tuple[int, int], int]] = {}


class Checkpoints:
    """Of one writing connection; all methods on its thread, outside a transaction."""

    def __init__(self, path: Path, writer: apsw.Connection) -> None:
        """From now on `writer` copies nothing by itself when it commits: that would be under way when its commit
        returns, and be taken for the time that it held the lock."""
        self._writer = writer
        self._guard = sql.open_reader(path)
        self._pages = 0
        self._copied = 0
        self._grew = 0
        self._path = str(path.resolve())
        self._log = -1
        self._salts = b""
        writer.setwalhook(self._committed)

    def _committed(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._grew = pages - self._pages if pages > self._pages else pages
        self._pages = pages
        self._copied = self._copied if self._copied < pages else 0  # it may have begun afresh
        return apsw.SQLITE_OK

    def close(self) -> None:
        """Twice is fine."""
        self._guard.close(True)
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _has_begun_afresh(self) -> bool:
        """Since it was asked last. SQLite takes no locks on the log's file: it can be opened and closed beside it."""
        if self._log < 0:
            self._log = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        before, self._salts = self._salts, os.pread(self._log, 8, _SALTS)
        return before != self._salts

    def before_write(self) -> None:
        """As soon as the lock is free again, the application may commit, and find much to copy."""
        if self._standing or self._pages >= MOST_PAGES:
            return
        if self._grew >= MANY_PAGES or self._pages >= SOON_PAGES:
            with contextlib.suppress(apsw.Error):
                self._stand()

    def after_commit(self) -> None:
        """Copy if there is much to copy."""
        if self._pages < COPY_PAGES:
            return
        with contextlib.suppress(OSError):
            if self._has_begun_afresh():
                self._copied = 0
        if self._pages - self._copied >= COPY_PAGES and self._copy():
            self.before_write()

    def at_rest(self) -> bool:
        """We have not written for a while: copy the rest of a long log, so that it can begin afresh. False: somebody
        commits meanwhile, or reads what is old; try again."""
        if self._standing or self._copied < self._pages >= COPY_PAGES:
            return self._copy()
        return True

    def step_aside(self) -> None:
        """Leave the rest to the application."""
        if self._standing:
            self._guard.execute("ROLLBACK")

    @property
    def _standing(self) -> bool:
        return not self._guard.getautocommit()

    def _copy(self) -> bool:
        """Whether all was copied, so that the log begins afresh with the next write; the guard is gone then. An error
        is left to the next one, as SQLite does: nothing is lost but time."""
        try:
            before = self._copied
            version = sql.integer(self._writer, _DATA_VERSION)
            self._stand()
            pages, self._copied = self._writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._pages = max(pages, 0)
            # What was committed while we copied is not among those pages.
            if self._copied >= self._pages and sql.integer(self._writer, _DATA_VERSION) == version:
                self.step_aside()
                return True
            if self._copied > before:
                self._sync_database()
            if self._pages >= MOST_PAGES:
                self.step_aside()
        except apsw.Error as error:
            log.debug("write-ahead log not copied", extra={"fields": {"error": str(error)}})
            with contextlib.suppress(apsw.Error):
                self.step_aside()
        return False

    def _sync_database(self) -> None:
        """SQLite waits for the disk only when it has copied to the end of the log. Whoever does that, the application
        perhaps, should not have to wait for all that was copied since the last time.

        On a descriptor of our own: of an error of the disk, each descriptor hears once, and SQLite has to hear of it
        before it lets the log begin afresh. Not through xSync of apsw, which keeps every other thread from running
        until the disk is done.
        """
        with contextlib.suppress(OSError):
            os.fdatasync(_descriptor(self._path))

    def _stand(self) -> None:
        """At the end of the log as it is now."""
        self.step_aside()
        self._guard.execute("BEGIN")
        sql.rows(self._guard, "PRAGMA schema_version")  # now the view is fixed


def _descriptor(path: str) -> int:
    """Of the file that is there now, for as long as this process lives. OSError: it is gone, or there are too many."""
    found = Path(path).stat()
    file = found.st_dev, found.st_ino
    if file not in _descriptors:
        _descriptors[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return _descriptors[file]
