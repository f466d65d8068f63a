"""CREATE TRIGGER statements: reading one, and writing it again as a TEMP trigger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, tee
from typing import NamedTuple

from harmonylite.db.sql import normal, quote
from harmonylite.db.tokens import Token, tokens

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
        return any(("RAISE", "(") in pairwise(token.keyword for token in tokens(text)) for text in texts)

    def resolves_conflicts(self) -> bool:
        """Whether a statement of the body is an INSERT OR .., an UPDATE OR .. or a REPLACE."""
        words = pairwise(token.keyword for token in tokens(self.body))
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
        all_tokens = list(tokens(self.body))
        for row, dot, column in zip(all_tokens, all_tokens[1:], all_tokens[2:], strict=False):
            if before != "." and dot.text == "." and column.kind in ("word", "quoted"):
                name = row.name.upper() if row.kind in ("word", "quoted") else ""
                if name in ("NEW", "OLD"):
                    yield row.start, column.end, Reference(name, normal(column.name))
            before = row.text


class _Header:
    """The tokens of a definition, read one by one."""

    def __init__(self, sql: str) -> None:
        self._ahead = tokens(sql)
        self._end = Token("end", "", len(sql), len(sql))
        self._next = next(self._ahead, self._end)

    def take(self) -> Token:
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
