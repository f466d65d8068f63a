"""SQL as tokens: as much as it takes to read a definition in sqlite_schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

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


class Token(NamedTuple):
    """kind: quoted, word or other; start, end: where it stands in the text."""

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


def tokens(sql: str) -> Iterator[Token]:
    """The tokens of a piece of SQL, without white space and comments."""
    for match in _TOKEN.finditer(sql):
        if match.lastgroup is not None and match.lastgroup != "space":
            yield Token(match.lastgroup, match[0], match.start(), match.end())
