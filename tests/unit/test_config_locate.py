"""Which line a key stands on."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harmonylite.config.locate import lines_of_keys

toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def test_tables_dotted_and_quoted_keys() -> None:
    text = 'a = 1\n"b c" = 2\nd . e = 3\n\n[ f . "g" ] # comment\nh = [1, # one\n  2]\ni = 4\n[[j]]\nk = 5\n'
    assert lines_of_keys(text) == {
        "a": 1,
        "b c": 2,
        "d.e": 3,
        "f.g": 5,
        "f.g.h": 6,
        "f.g.i": 8,
        "j": 9,
        "j.k": 10,
    }


def test_what_looks_like_a_key_inside_a_value_is_none() -> None:
    text = (
        'a = """\nb = 1\n[c]\n"""\nd = [\n  "]",\n  \'[\',\n# ]\n  "e = 1",\n]\n'
        "f = '''x''' # '''\ng = { h = [ 1 ],\n i = 2 }\nj = 1\n"
    )
    assert lines_of_keys(text) == {"a": 1, "d": 5, "f": 11, "g": 12, "j": 14}


_names = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
_values = st.sampled_from(
    ["1", '"x"', '"a # b"', "'['", '"""\nq = 1\n"""', "'''\n[t]\n'''", "[\n 1,\n 2 # ]\n]", "[]", "{ z = 1 }", '"\\""']
)


@given(st.dictionaries(_names, st.dictionaries(_names, _values, max_size=4), max_size=4))
def test_every_key_of_valid_toml_is_found_where_it_was_written(tables: dict[str, dict[str, str]]) -> None:
    lines: list[str] = []
    expected: dict[str, int] = {}
    for table, keys in tables.items():
        lines.append(f"[{table}] # header")
        expected[table] = len(lines)
        for key, value in keys.items():
            first = f"  {key} = {value} # end"
            expected[f"{table}.{key}"] = len(lines) + 1
            lines.extend(first.split("\n"))
    text = "\n".join(lines)
    data: dict[str, Any] = toml.loads(text)
    assert set(data) == set(tables)
    assert lines_of_keys(text) == expected
