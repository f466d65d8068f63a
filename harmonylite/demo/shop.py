"""The demo's application: a shop's products and orders in SQLite, through Python's own sqlite3.

Nothing here knows that the file is replicated.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

# Keys that no other node makes up at the same time: an order's id begins with the shop's name.
_SCHEMA = """
CREATE TABLE products (id TEXT PRIMARY KEY, price INTEGER NOT NULL);
CREATE TABLE orders (id TEXT PRIMARY KEY, total INTEGER NOT NULL);
CREATE TABLE order_lines (
  order_id TEXT NOT NULL REFERENCES orders (id), line INTEGER NOT NULL,
  product TEXT NOT NULL, amount INTEGER NOT NULL, price INTEGER NOT NULL,
  PRIMARY KEY (order_id, line)
) WITHOUT ROWID;
"""
TABLES = ("products", "orders", "order_lines")
LINES_PER_ORDER = 3

# Orders whose total is not that of their lines, and lines without an order.
_HALF_ORDERS = """
SELECT (SELECT count(*) FROM orders o
        WHERE total <> (SELECT total(amount * price) FROM order_lines WHERE order_id = o.id))
     + (SELECT count(*) FROM order_lines WHERE order_id NOT IN (SELECT id FROM orders)),
       (SELECT count(*) FROM orders)
"""
_BUSY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Content:
    """What the application's tables hold. counts: rows, in the order of TABLES; digest: SHA-256 of all rows, hex."""

    counts: tuple[int, ...]
    digest: str


class Ledger:
    """What one single database would hold if it had taken every write of all shops, in the order of writing.

    That is what the last writer wins means, made by SQLite alone: the demo's databases are compared with it.
    """

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.executescript(_SCHEMA)

    def content(self) -> Content:
        return _content(self.connection)


class Shop:
    """One application with its database. Not shared between threads, but for `half_orders`.

    committed: when the last transaction was, monotonic seconds.
    """

    def __init__(self, name: str, path: Path, ledger: Ledger) -> None:
        """Makes the database."""
        self.name = name
        self._path = path
        self._ledger = ledger
        self._orders = 0
        self.committed = 0.0
        self._connection = self._connect()
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        self._connection.close()

    def add_products(self, prices: dict[str, int]) -> None:
        """One transaction. prices: in cents."""

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT INTO products VALUES (?, ?)", prices.items())

        self._transaction(write)

    def remove_product(self, name: str) -> None:
        self._transaction(lambda connection: connection.execute("DELETE FROM products WHERE id = ?", (name,)))

    def set_price(self, product: str, cents: int) -> int:
        """Returns when that was written: milliseconds since 1970."""
        self._transaction(
            lambda connection: connection.execute("UPDATE products SET price = ? WHERE id = ?", (cents, product))
        )
        return time.time_ns() // 1_000_000

    def sell(self) -> float:
        """An order and its lines, in one transaction. Returns the seconds that it took."""
        self._orders += 1
        order = f"{self.name}-{self._orders}"
        found = self._connection.execute("SELECT id, price FROM products ORDER BY id").fetchall()
        lines = [
            (order, line + 1, *(found[(self._orders + line) % len(found)]), 1 + (self._orders + line) % 4)
            for line in range(LINES_PER_ORDER)
        ]
        total = sum(price * amount for *_, price, amount in lines)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO orders VALUES (?, ?)", (order, total))
            connection.executemany(
                "INSERT INTO order_lines (order_id, line, product, price, amount) VALUES (?, ?, ?, ?, ?)", lines
            )

        return self._transaction(write)

    def price(self, product: str) -> int | None:
        """In cents; None: there is no such product."""
        row = self._connection.execute("SELECT price FROM products WHERE id = ?", (product,)).fetchone()
        return None if row is None else int(row[0])

    def count(self, table: str) -> int:
        """Rows of one of TABLES."""
        return int(self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def content(self) -> Content:
        return _content(self._connection)

    def half_orders(self, go_on: Callable[[], bool]) -> Iterator[tuple[int, int]]:
        """Look again and again while `go_on()`: yields how many orders are torn, and how many there are.

        On a connection of its own: for another thread.
        """
        with closing(self._connect()) as connection:
            while go_on():
                torn, orders = connection.execute(_HALF_ORDERS).fetchone()
                yield int(torn), int(orders)

    def _transaction(self, write: Callable[[sqlite3.Connection], object]) -> float:
        begun = time.monotonic()
        with _committed(self._connection):
            write(self._connection)
        self.committed = time.monotonic()
        with _committed(self._ledger.connection):
            write(self._ledger.connection)
        return self.committed - begun

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


@contextmanager
def _committed(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _content(connection: sqlite3.Connection) -> Content:
    digest = hashlib.sha256()
    counts = []
    connection.execute("BEGIN")  # all tables as of one moment
    try:
        for table in TABLES:
            rows = connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            counts.append(len(rows))
            digest.update(f"{table} {rows!r}\n".encode())
    finally:
        connection.execute("COMMIT")
    return Content(tuple(counts), digest.hexdigest())
