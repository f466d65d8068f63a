"""`demo`: three nodes in a temporary folder, converging."""

from __future__ import annotations

import argparse

from harmonylite.cli.command import Command


def run(arguments: argparse.Namespace) -> int:
    from harmonylite import demo

    return demo.main(keep=arguments.keep)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", action="store_true", help="leave the folder, and say how to look at it")


COMMAND = Command(
    name="demo",
    summary="three nodes in a temporary folder, writes on each, and how they converge",
    description=(
        "Run three nodes in a temporary folder: writes on each, a transaction that stays whole, a network cut with\n"
        "edits of the same rows on both sides, and a comparison of the databases at the end. Needs no configuration;\n"
        "exits with 0 only if the databases are identical and hold all that was written."
    ),
    examples=("harmonylite demo", "harmonylite demo --keep"),
    add_arguments=_add_arguments,
    run=run,
)
