"""What the benchmarks have in common that are programs by themselves: how they begin, and what they leave."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import describe_machine, describe_versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# On a disk: /tmp may be memory.
FOLDER = Path("/var/tmp")


def begin(parser: argparse.ArgumentParser, *, root_because: str = "") -> argparse.Namespace:
    """The arguments, `--json` among them; the machine is printed. root_because: why only root may run it."""
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if root_because and os.geteuid() != 0:
        parser.error(f"{root_because}: run it as root")
    print(describe_machine(FOLDER), describe_versions(), sep="\n")
    return arguments


def keep(results: Sequence[DataclassInstance], arguments: argparse.Namespace) -> None:
    """Write the results to the file of `--json`."""
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
