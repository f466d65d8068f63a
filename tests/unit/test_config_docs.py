"""The documentation of the configuration names every key, and its files are what the keys say."""

from __future__ import annotations

import re
from pathlib import Path

from harmonylite.config import document, load
from harmonylite.config.model import KEYS, TABLES, value_of

DOCS = Path(__file__).parents[2] / "docs"
ANEW = "write it anew: python -m harmonylite.config.document docs"


def test_the_example_is_current() -> None:
    assert (DOCS / "config.toml").read_text("utf-8") == document.example(), ANEW


def test_the_reference_is_current() -> None:
    page = (DOCS / "configuration.md").read_text("utf-8")
    assert page == document.with_reference(page), ANEW


def test_the_example_loads_without_a_remark() -> None:
    config = load(DOCS / "config.toml", {"node_id": 1})
    assert config.notes == ()


def test_the_example_shows_every_key_with_its_default(tmp_path: Path) -> None:
    text = (DOCS / "config.toml").read_text("utf-8")
    file = tmp_path / "config.toml"
    file.write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    config = load(file)
    assert config.notes == ()
    for name, key in KEYS.items():
        short = name.rpartition(".")[2]
        assert re.search(rf"^(# )?{short} = ", text, re.MULTILINE), name
        if name not in ("db_path", "node_id"):
            assert value_of(config, name) == key.default, name


def test_the_reference_names_every_key_in_its_table() -> None:
    page = (DOCS / "configuration.md").read_text("utf-8")
    for table in TABLES.values():
        title = f"### `[{table.name}]`" if table.name else "### Top of the file"
        section = page.partition(f"{title}\n")[2].partition("\n###")[0]
        named = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
        assert named == {key.short_name for key in KEYS.values() if key.table == table.name}, title


def test_the_examples_in_the_page_load(tmp_path: Path) -> None:
    page = (DOCS / "configuration.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "# on each device" not in block]
    assert len(blocks) >= 3
    for block in blocks:
        # Files that only exist on a device, and what needs them.
        block = re.sub(r"^(user_name|(user_password|ca)_file).*$", "", block, flags=re.MULTILINE)
        file = tmp_path / "config.toml"
        file.write_text(block if block.startswith("db_path") else f'db_path = "a.db"\n{block}')
        assert load(file, {"node_id": 1}).notes == ()
