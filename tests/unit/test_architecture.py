"""docs/architecture.md names every module once, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import harmonylite
from tests.documented import DOCS

PACKAGE = Path(harmonylite.__file__).parent


def named() -> list[str]:
    """The modules that the map names. A row of a folder lists them in its second column; in the first column a name
    without a folder is in that of the name before it."""
    text = (DOCS / "architecture.md").read_text("utf-8").partition("## Module map")[2].partition("\n## ")[0]
    modules: list[str] = []
    for places, owns in re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE):
        folder = ""
        for place in re.findall("`([^`]+)`", places):
            if place.endswith("/"):
                modules += [place + name for name in re.findall(r"`(\w+)`", owns)]
                continue
            if "/" in place:
                folder = place[: place.rindex("/") + 1]
            modules.append(folder + place.rpartition("/")[2])
    return modules


def test_the_map_names_every_module_once() -> None:
    files = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    assert sorted(named()) == sorted(path.as_posix() for path in files if not path.name.startswith("__"))
