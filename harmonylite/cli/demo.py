"""`demo`: three nodes in a temporary folder, converging."""

from __future__ import annotations

import argparse

from harmonylite.cli.command import Command


def run(arguments: argparse.Namespace) -> int:
    from harmonylite import demo

    return demo.main()


COMMAND = Command(
    name="demo",
    summary="three nodes in a temporary folder, writes on each, and how they converge",
    examples=("harmonylite demo",),
    run=run,
)
