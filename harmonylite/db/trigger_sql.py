"""CREATE TRIGGER statements: reading one, and writing it again as a TEMP trigger."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, tee
from typing import NamedTuple

from harmonylite.db.sql import normal, quote

# What the statements of a trigger's body begin with.
_STATEMENTS = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE", "SELECT", "WITH", "VALUES"})
_RESOLUTIONS = frozenset({"REPLACE", "IGNORE", "ABORT", "FAIL", "ROLLBACK"})


class Reference(NamedTuple):
    """A value of the row that fired the trigger. row: NEW or OLD."""

    row: str
    column: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """A CREATE TRIGGER statement. `condition` (of WHEN) and `body` (BEGIN to END) are as they were written."""

    timing: str  # BEFORE, AFTER, INSTEAD OF
    event: str  # INSERT, UPDATE, DELETE
    columns: tuple[str, ...]  # of UPDATE OF
    condition: str
    body: str

    def temp_sql(self, name: str, table: str) -> str:
        """The same trigger as a TEMP trigger called `name` on the main schema's `table`."""
        of = f" OF {', '.join(map(quote, self.columns))}" if self.columns else ""
        when = f" WHEN {self.condition}" if self.condition else ""
        head = f"CREATE TEMP TRIGGER {quote(name)} {self.timing} {self.event}{of} ON main.{quote(table)}"
        return f"{head}{when}\n{self.body}"

    def raises(self) -> bool:
        """Whether RAISE(...) stands anywhere in it. (A column may be called raise.)"""
        texts = (self.condition, self.body)
        return any(("RAISE", "(") in pairwise(token.keyword for token in _tokens(text)) for text in texts)

    def resolves_conflicts(self) -> bool:
        """Whether a statement of the body is an INSERT OR .., an UPDATE OR .. or a REPLACE."""
        words = pairwise(token.keyword for token in _tokens(self.body))
        return any(pair == ("REPLACE", "INTO") or (pair[0] == "OR" and pair[1] in _RESOLUTIONS) for pair in words)

    def references(self) -> tuple[Reference, ...]:
        """The values of NEW and OLD that the body uses, each once."""
        return tuple(dict.fromkeys(reference for _, _, reference in self._referring()))

    def body_with(self, names: Mapping[Reference, str]) -> str:
        """The body with other expressions in the place of NEW's and OLD's values."""
        parts: list[str] = []
        end = 0
        for start, stop, reference in self._referring():
            parts += [self.body[end:start], names[reference]]
            end = stop
        return "".join([*parts, self.body[end:]])

    def _referring(self) -> Iterator[tuple[int, int, Reference]]:
        before = ""
        tokens = list(_tokens(self.body))
        for row, dot, column in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if before != "." and dot.text == "." and column.kind in ("word", "quoted"):
                name = row.name.upper() if row.kind in ("word", "quoted") else ""
                if name in ("NEW", "OLD"):
                    yield row.start, column.end, Reference(name, normal(column.name))
            before = row.text


# https://sqlite.org/lang_keywords.html: four ways to quote a name; any character above ASCII is a letter.
_TOKEN = re.compile(
    r"""
    (?P<space> [ \t\n\f\r]+ | --[^\n]* | /\*.*?(?:\*/|\Z) )
  | (?P<quoted> '(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*` | \[[^\]]*\] )
  | (?P<word> [A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]* )
  | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int

    @property
    def keyword(self) -> str:
        """In capitals; "" for something quoted, which is never a keyword."""
        return "" if self.kind == "quoted" else self.text.upper()

    @property
    def name(self) -> str:
        """As an identifier. Raises ValueError if it cannot be one."""
        if self.kind == "word":
            return self.text
        if self.kind != "quoted":
            raise ValueError(f"a name was expected, not {self.text!r}")
        mark = self.text[-1]
        return self.text[1:-1].replace(mark * 2, mark) if mark != "]" else self.text[1:-1]


def _tokens(sql: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(sql):
        if match.lastgroup is not None and match.lastgroup != "space":
            yield _Token(match.lastgroup, match[0], match.start(), match.end())


class _Header:
    """The tokens of a definition, read one by one."""

    def __init__(self, sql: str) -> None:
        self._ahead = _tokens(sql)
        self._end = _Token("end", "", len(sql), len(sql))
        self._next = next(self._ahead, self._end)

    def take(self) -> _Token:
        taken, self._next = self._next, next(self._ahead, self._end)
        return taken

    def skip(self, *keywords: str) -> str:
        """Take the next token if it is one of `keywords`; "" if it is not."""
        return self.take().keyword if self._next.keyword in keywords else ""

    def expect(self, *keywords: str) -> str:
        if self._next.keyword not in keywords:
            raise ValueError(f"{' or '.join(keywords)} was expected, not {self._next.text!r}")
        return self.take().keyword

    @property
    def position(self) -> int:
        return self._next.start

    def find_body(self) -> int:
        """Go to the BEGIN that starts the body; a column may be called begin, too."""
        while self._next.kind != "end":
            begin = self._next
            if begin.keyword == "BEGIN":
                self._ahead, ahead = tee(self._ahead)
                if next(ahead, self._end).keyword in _STATEMENTS:
                    return begin.start
            self.take()
        raise ValueError("BEGIN was expected before the end")


def parse(sql: str) -> Declaration:
    """Read a trigger's definition. Raises ValueError if it is not one.

    The grammar: https://sqlite.org/lang_createtrigger.html. Most keywords may also be names (a trigger called
    `after`), so each word is read by its position.
    """
    header = _Header(sql)
    header.expect("CREATE")
    header.skip("TEMP", "TEMPORARY")
    header.expect("TRIGGER")
    if header.take().keyword == "IF" and header.skip("NOT"):
        header.expect("EXISTS")
        header.take()
    if header.skip("."):
        header.take()
    timing = header.skip("BEFORE", "AFTER", "INSTEAD") or "BEFORE"
    if timing == "INSTEAD":
        timing += " " + header.expect("OF")
    event = header.expect("INSERT", "UPDATE", "DELETE")
    columns: list[str] = []
    if event == "UPDATE" and header.skip("OF"):
        columns.append(header.take().name)
        while header.skip(","):
            columns.append(header.take().name)
    header.expect("ON")
    header.take()
    if header.skip("."):
        header.take()
    if header.skip("FOR"):
        header.expect("EACH")
        header.expect("ROW")
    condition = sql[header.position : header.find_body()] if header.skip("WHEN") else ""
    return Declaration(timing, event, tuple(columns), condition.strip(), sql[header.find_body() :])
