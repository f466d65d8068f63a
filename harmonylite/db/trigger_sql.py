"""CREATE TRIGGER statements: reading one, and writing it again as a TEMP trigger."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from harmonylite.db.sql import quote


@dataclass(frozen=True, slots=True)
class Declaration:
    """A CREATE TRIGGER statement. `rest`: everything after the table's name, as it was written."""

    timing: str  # BEFORE, AFTER, INSTEAD OF
    event: str  # INSERT, UPDATE, DELETE
    columns: tuple[str, ...]  # of UPDATE OF
    rest: str

    def temp_sql(self, name: str, table: str) -> str:
        """The same trigger as a TEMP trigger called `name` on the main schema's `table`."""
        of = f" OF {', '.join(map(quote, self.columns))}" if self.columns else ""
        head = f"CREATE TEMP TRIGGER {quote(name)} {self.timing} {self.event}{of}"
        return f"{head} ON main.{quote(table)} {self.rest}"

    def raises(self) -> bool:
        """Whether RAISE(...) stands anywhere in it. (A column may be called raise.)"""
        tokens = [token.keyword for token in _tokens(self.rest)]
        return ("RAISE", "(") in pairwise(tokens)


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
            yield _Token(match.lastgroup, match[0], match.end())


class _Header:
    """The tokens of a definition, read one by one."""

    def __init__(self, sql: str) -> None:
        self._ahead = _tokens(sql)
        self._end = _Token("end", "", len(sql))
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


def parse(sql: str) -> Declaration:
    """Read a trigger's definition up to the name of its table. Raises ValueError if it is not one.

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
    table = header.take()
    if header.skip("."):
        table = header.take()
    return Declaration(timing, event, tuple(columns), sql[table.end :].lstrip())
