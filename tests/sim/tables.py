"""The application's tables in the simulation: every kind of key and of secondary unique index, and pools of values.

The pools are small on purpose: writes of different nodes should meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import apsw

from harmonylite.model import RawText, Row, Value

# A stored value as it is compared here: its storage class and its content (TEXT as bytes, REAL as repr).
Cell = tuple[str, object]
RowState = tuple[Cell, ...]
# What makes two rows the same row: the key's cells, folded as the key's collation and numbers compare.
Key = tuple[Cell, ...]

NOTES: tuple[Value, ...] = (
    None,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    1.5,
    float("inf"),
    float("-inf"),
    5e-324,
    -0.0,
    "",
    "text",
    "nul\x00inside",
    "ünï ☃",
    RawText(b"\xff\xfe"),
    b"",
    b"\x00\xff",
    b"blob" * 6,
)
EMAILS: tuple[Value, ...] = (None, "a", "b", "c", "A", "B")
SLOTS: tuple[Value, ...] = (None, 1, 2, 3)


# What a unique index holds of a row; None: nothing (a NULL, a row outside of a partial index).
Indexed = Callable[[Mapping[str, Cell]], object]


def _index(*columns: str, folded: bool = False, where: tuple[str, Cell] | None = None) -> Indexed:
    def entry(row: Mapping[str, Cell]) -> object:
        cells = [row[column] for column in columns]
        if any(kind == "null" for kind, _ in cells) or (where is not None and row[where[0]] != where[1]):
            return None
        return [(kind, str(content).lower()) if folded else (kind, content) for kind, content in cells]

    return entry


@dataclass(frozen=True)
class Table:
    """One replicated table of the application.

    `key`: the primary key's columns in key order; `columns`: every stored column, `serial` among them (each
    statement writes its own serial number, so that a row's content tells which write it came from).
    `pools`: the values that operations write into the remaining columns. `exact`: the outcome can be predicted
    from the application's statements alone (no secondary unique index, no cascade). `untraced`: REPLACE can remove
    a row and no trigger can tell which (cascades), so that the time is a guess. `silent`: REPLACE can remove a row
    through an index that no trigger watches: that shows when the write that removed it is absorbed.
    `full_text_index`: an FTS5 table, not replicated, that the application's triggers keep in step with this one.
    """

    name: str
    ddl: tuple[str, ...]
    key: tuple[str, ...]
    columns: tuple[str, ...]
    keys: tuple[Row, ...]
    pools: tuple[tuple[str, tuple[Value, ...]], ...] = (("note", NOTES),)
    nocase: frozenset[str] = frozenset()
    swappable: tuple[str, ...] = ()
    indexes: tuple[Indexed, ...] = ()
    needs: tuple[str, ...] = ()
    exact: bool = True
    untraced: bool = False
    silent: bool = False
    written_directly: bool = True
    full_text_index: str = ""

    @property
    def unique(self) -> bool:
        """Whether a secondary unique index can make two rows clash."""
        return bool(self.indexes)

    def clash(self, one: RowState, other: RowState) -> bool:
        """Whether two rows may not stand beside each other."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in (one, other)]
        entries = [[index(row) for row in rows] for index in self.indexes]
        return any(mine is not None and mine == theirs for mine, theirs in entries)


def cell(value: Value) -> Cell:
    """A Python value as the cell that SQLite stores for it, if no affinity changes it."""
    if value is None:
        return ("null", None)
    if isinstance(value, RawText):
        return ("text", bytes(value))
    if isinstance(value, str):
        return ("text", value.encode())
    if isinstance(value, bytes):
        return ("blob", value)
    if isinstance(value, float):
        return ("real", repr(value))
    return ("integer", value)


def row_key(table: Table, cells: Sequence[Cell]) -> Key:
    """The identity of a row whose key columns hold `cells`."""
    folded: list[Cell] = []
    for name, (kind, content) in zip(table.key, cells, strict=True):
        if kind == "real":
            assert isinstance(content, str)
            folded.append(("number", float(content)))
        elif kind == "integer":
            folded.append(("number", content))
        elif kind == "text" and name in table.nocase:
            assert isinstance(content, bytes)
            folded.append(("text", content.lower()))
        else:
            folded.append((kind, content))
    return tuple(folded)


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def read_columns(
    connection: apsw.Connection,
    source: str,
    columns: Sequence[str],
    where: str = "",
    bindings: Sequence[Value] = (),
) -> list[RowState]:
    """Rows of table `source` with storage classes, TEXT as bytes: also TEXT that is not UTF-8."""
    parts = ", ".join(
        f"typeof({c}), CASE typeof({c}) WHEN 'text' THEN CAST({c} AS BLOB) ELSE {c} END" for c in map(quote, columns)
    )
    rows: list[RowState] = []
    for values in connection.execute(f"SELECT {parts} FROM {quote(source)}{where}", bindings):
        pairs = zip(values[::2], values[1::2], strict=True)
        rows.append(tuple((str(k), repr(v) if k == "real" else v) for k, v in pairs))
    return rows


def read_rows(connection: apsw.Connection, table: Table) -> dict[Key, RowState]:
    """The table's rows by identity; rows with a NULL in their key are not replicated and left out."""
    places = [table.columns.index(name) for name in table.key]
    rows: dict[Key, RowState] = {}
    for row in read_columns(connection, table.name, table.columns):
        key = [row[place] for place in places]
        if not any(kind == "null" for kind, _ in key):
            rows[row_key(table, key)] = row
    return rows


def _integers(count: int) -> tuple[Row, ...]:
    return tuple((n,) for n in range(1, count + 1))


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "counter",
            ("CREATE TABLE counter (id INTEGER PRIMARY KEY, serial INTEGER, note)",),
            ("id",),
            ("id", "serial", "note"),
            ((1,), (2,), (3,), (-1,), (2**63 - 1,)),
        ),
        Table(
            "text key",
            ('CREATE TABLE "text key" (name TEXT PRIMARY KEY, serial INTEGER, note)',),
            ("name",),
            ("name", "serial", "note"),
            (("a",), ("A",), ("é",), ("",), (RawText(b"\xff"),), (None,), (7,)),
        ),
        Table(
            "order",
            ('CREATE TABLE "order" ("näme ""x""" TEXT COLLATE NOCASE PRIMARY KEY, serial INTEGER, note)',),
            ('näme "x"',),
            ('näme "x"', "serial", "note"),
            (("a",), ("A",), ("b",), ("B",), ("É",), ("é",)),
            nocase=frozenset({'näme "x"'}),
        ),
        Table(
            "composite",
            (
                "CREATE TABLE composite (a INTEGER, serial INTEGER, b TEXT, note,"
                " twice INTEGER GENERATED ALWAYS AS (serial * 2) STORED, PRIMARY KEY (b, a))",
            ),
            ("b", "a"),
            ("a", "serial", "b", "note"),
            (("x", 1), ("x", 2), ("y", 1), ("y", None)),
        ),
        Table(
            "blob_key",
            ("CREATE TABLE blob_key (k BLOB PRIMARY KEY, serial INTEGER, note)",),
            ("k",),
            ("k", "serial", "note"),
            ((b"",), (b"\x00",), (b"\xff" * 40,)),
        ),
        Table(
            "real_key",
            ("CREATE TABLE real_key (k REAL PRIMARY KEY, serial INTEGER, note)",),
            ("k",),
            ("k", "serial", "note"),
            ((1,), (1.5,), (float("inf"),), (0.1 + 0.2,), (0.3,)),
        ),
        Table(
            "any_key",
            ("CREATE TABLE any_key (k PRIMARY KEY, serial INTEGER, note)",),
            ("k",),
            ("k", "serial", "note"),
            ((1,), (1.0,), ("1",), (b"1",), (2**53 + 1,), (float(2**53),)),
        ),
        Table(
            "no_rowid",
            (
                "CREATE TABLE no_rowid (a TEXT COLLATE NOCASE, b INTEGER, serial INTEGER, note,"
                " PRIMARY KEY (a, b)) WITHOUT ROWID",
            ),
            ("a", "b"),
            ("a", "b", "serial", "note"),
            (("x", 1), ("X", 1), ("x", 2), ("y", 1)),
            nocase=frozenset({"a"}),
        ),
        Table(
            "strict_table",
            (
                "CREATE TABLE strict_table (id TEXT PRIMARY KEY NOT NULL, serial INTEGER, note ANY,"
                " size REAL NOT NULL DEFAULT 1.0) STRICT",
            ),
            ("id",),
            ("id", "serial", "note", "size"),
            (("a",), ("b",), ("c",)),
            pools=(("note", NOTES), ("size", (1.0, 2.5, 3.0))),
        ),
        Table(
            "one_unique",
            ("CREATE TABLE one_unique (id INTEGER PRIMARY KEY, serial INTEGER, email TEXT UNIQUE, note)",),
            ("id",),
            ("id", "serial", "email", "note"),
            _integers(4),
            pools=(("email", EMAILS), ("note", NOTES)),
            swappable=("email",),
            indexes=(_index("email"),),
            exact=False,
        ),
        Table(
            "two_unique",
            (
                "CREATE TABLE two_unique (id TEXT PRIMARY KEY, serial INTEGER,"
                " email TEXT COLLATE NOCASE UNIQUE, slot INTEGER UNIQUE) WITHOUT ROWID",
            ),
            ("id",),
            ("id", "serial", "email", "slot"),
            (("p",), ("q",), ("r",), ("s",)),
            pools=(("email", EMAILS), ("slot", SLOTS)),
            swappable=("email", "slot"),
            indexes=(_index("email", folded=True), _index("slot")),
            exact=False,
        ),
        Table(
            "pair_unique",
            (
                "CREATE TABLE pair_unique (id INTEGER PRIMARY KEY, serial INTEGER, email TEXT,"
                " slot INTEGER, UNIQUE (slot, email))",
            ),
            ("id",),
            ("id", "serial", "email", "slot"),
            _integers(4),
            pools=(("email", EMAILS[:3]), ("slot", SLOTS[:3])),
            swappable=("email",),
            indexes=(_index("slot", "email"),),
            exact=False,
        ),
        Table(
            "partial_unique",
            (
                "CREATE TABLE partial_unique (id INTEGER PRIMARY KEY, serial INTEGER, email TEXT, active)",
                "CREATE UNIQUE INDEX active_email ON partial_unique (email) WHERE active = 1",
            ),
            ("id",),
            ("id", "serial", "email", "active"),
            _integers(4),
            pools=(("email", EMAILS[:4]), ("active", (0, 1, 1))),
            swappable=("email",),
            indexes=(_index("email", where=("active", ("integer", 1))),),
            exact=False,
            silent=True,
        ),
        Table(
            "expression_unique",
            (
                "CREATE TABLE expression_unique (id INTEGER PRIMARY KEY, serial INTEGER, email TEXT, note)",
                "CREATE UNIQUE INDEX lower_email ON expression_unique (lower(email))",
            ),
            ("id",),
            ("id", "serial", "email", "note"),
            _integers(4),
            pools=(("email", EMAILS), ("note", NOTES)),
            swappable=("email",),
            indexes=(_index("email", folded=True),),
            exact=False,
            silent=True,
        ),
        Table(
            "parent",
            ("CREATE TABLE parent (id INTEGER PRIMARY KEY, serial INTEGER, note)",),
            ("id",),
            ("id", "serial", "note"),
            _integers(3),
            needs=("child",),
        ),
        Table(
            "child",
            (
                "CREATE TABLE child (id INTEGER PRIMARY KEY, serial INTEGER, note,"
                " parent_id INTEGER REFERENCES parent(id) ON DELETE CASCADE)",
            ),
            ("id",),
            ("id", "serial", "note", "parent_id"),
            _integers(4),
            pools=(("note", NOTES[:4]), ("parent_id", (None, 1, 1, 2, 3))),
            needs=("parent",),
            exact=False,
            untraced=True,
        ),
        Table(
            "counted",
            (
                "CREATE TABLE counted (id INTEGER PRIMARY KEY, serial INTEGER, note)",
                "CREATE TABLE tally (id INTEGER PRIMARY KEY, serial INTEGER, changes INTEGER)",
                "CREATE TRIGGER count_insert AFTER INSERT ON counted BEGIN"
                " INSERT INTO tally VALUES (NEW.id % 2, NEW.serial, 1)"
                " ON CONFLICT (id) DO UPDATE SET serial = NEW.serial, changes = changes + 1; END",
                "CREATE TRIGGER count_update AFTER UPDATE ON counted BEGIN"
                " UPDATE tally SET serial = NEW.serial, changes = changes + 1 WHERE id = NEW.id % 2; END",
            ),
            ("id",),
            ("id", "serial", "note"),
            _integers(4),
            needs=("tally",),
        ),
        Table(
            "tally",
            (),  # made by `counted`, whose triggers write it
            ("id",),
            ("id", "serial", "changes"),
            ((0,), (1,)),
            needs=("counted",),
            written_directly=False,
        ),
        Table(
            "document",
            (
                "CREATE TABLE document (id INTEGER PRIMARY KEY, serial INTEGER, body TEXT)",
                "CREATE VIRTUAL TABLE document_index USING fts5 (body, content = 'document', content_rowid = 'id')",
                "CREATE TRIGGER index_insert AFTER INSERT ON document BEGIN"
                " INSERT INTO document_index (rowid, body) VALUES (NEW.id, NEW.body); END",
                "CREATE TRIGGER index_delete AFTER DELETE ON document BEGIN"
                " INSERT INTO document_index (document_index, rowid, body)"
                " VALUES ('delete', OLD.id, OLD.body); END",
                "CREATE TRIGGER index_update AFTER UPDATE ON document BEGIN"
                " INSERT INTO document_index (document_index, rowid, body)"
                " VALUES ('delete', OLD.id, OLD.body);"
                " INSERT INTO document_index (rowid, body) VALUES (NEW.id, NEW.body); END",
            ),
            ("id",),
            ("id", "serial", "body"),
            _integers(4),
            pools=(("body", (None, "one two", "two three", "ünï four", "five")),),
            full_text_index="document_index",
        ),
    )
}


def with_needed(names: Sequence[str]) -> tuple[str, ...]:
    """`names` with the tables that they cannot stand without, in the order of TABLES."""
    wanted = set(names)
    for name in names:
        wanted.update(TABLES[name].needs)
    return tuple(name for name in TABLES if name in wanted)
