"""CREATE INDEX statements: their terms and their WHERE, as text."""

from __future__ import annotations

from dataclasses import dataclass

from harmonylite.db.sql import normal
from harmonylite.db.tokens import Token, tokens


@dataclass(frozen=True, slots=True)
class IndexText:
    """terms: the indexed expressions, without ASC and DESC; where: of a partial index, else empty."""

    terms: tuple[str, ...]
    where: str

    def words(self) -> frozenset[str]:
        """Every name that occurs, folded as SQLite folds it."""
        texts = (*self.terms, self.where)
        named = (token for text in texts for token in tokens(text) if token.kind in ("word", "quoted"))
        return frozenset(normal(token.name) for token in named)


def parse(sql: str) -> IndexText:
    """Read an index's definition (https://sqlite.org/lang_createindex.html). Raises ValueError if it is not one."""
    found = list(tokens(sql))
    start = next((i for i, token in enumerate(found) if token.text == "("), None)
    if start is None:
        raise ValueError("an index without columns")
    terms: list[str] = []
    depth, begin, at = 0, start + 1, start
    for at in range(start, len(found)):
        text = found[at].text
        depth += (text == "(") - (text == ")")
        if depth == 0 or (depth == 1 and text == ","):
            terms.append(_term(sql, found[begin:at]))
            begin = at + 1
        if depth == 0:
            break
    rest = found[at + 1 :]
    if not rest:
        return IndexText(tuple(terms), "")
    if rest[0].keyword != "WHERE" or len(rest) < 2:
        raise ValueError(f"WHERE was expected, not {rest[0].text!r}")
    return IndexText(tuple(terms), sql[rest[1].start : rest[-1].end])


def _term(sql: str, part: list[Token]) -> str:
    if part and part[-1].keyword in ("ASC", "DESC"):
        part = part[:-1]
    if not part:
        raise ValueError("an empty term")
    return sql[part[0].start : part[-1].end]
