"""Nodes that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.db.harness import Clock, Node

MakeNode = Callable[..., Node]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeNode]:
    """`make(node_id, script, clock=.., **settings)`: a started node whose file the script has prepared."""
    nodes: list[Node] = []

    def make_node(node_id: int, script: str = "", *, clock: Clock | None = None, **settings: Any) -> Node:
        node = Node(tmp_path / f"node-{len(nodes)}.db", node_id, script, clock=clock)
        nodes.append(node)
        return node.start(**settings)

    yield make_node
    for node in nodes:
        node.replica.close()
        node.app.close()
