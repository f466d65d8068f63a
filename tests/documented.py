"""What the documentation says, for tests that try it."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def node_may_publish(*parts: str) -> list[str]:
    """The subjects that node 7 must be allowed to publish to, by docs/configuration.md; of those, the ones in which one
    of `parts` occurs, if any is given."""
    text = (DOCS / "configuration.md").read_text("utf-8")
    [listed] = re.findall(r"publish: \[\n(.*?)\n *\]", text, re.DOTALL)
    subjects = re.findall(r'^ *"([^"]+)"$', listed, re.MULTILINE)
    assert len(subjects) == sum(not line.lstrip().startswith("#") for line in listed.splitlines())
    return [subject for subject in subjects if not parts or any(part in subject for part in parts)]
