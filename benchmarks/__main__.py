"""Run the benchmarks: `python -m benchmarks [--json FILE] [--only NAME ...] [--quick] [--gigabyte] [--folder DIR]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import catchup, idle, latency, locks, throughput, wire_size, write_path
from benchmarks.figures import Figure, Setting, table, to_json
from benchmarks.machine import describe_machine, describe_versions

BENCHMARKS: Mapping[str, tuple[str, Callable[[Setting], Iterator[Figure]]]] = {
    "write": ("cost of capture", write_path.run),
    "throughput": ("throughput, commit to commit", throughput.run),
    "latency": ("latency, commit to visible", latency.run),
    "idle": ("start and idle", idle.run),
    "wire": ("bytes in the stream", wire_size.run),
    "locks": ("the application's writes beside a backlog", locks.run),
    "catchup": ("catching up from a snapshot", catchup.run),
}


def main() -> int:
    """Returns the exit code: 1 if a benchmark could not be run; a missed aim is a result, not a failure."""
    arguments = _arguments()
    names = arguments.only or list(BENCHMARKS)
    results: dict[str, list[Figure]] = {}
    failed: dict[str, str] = {}
    load = os.getloadavg()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="harmonylite-bench-", dir=arguments.folder) as folder:
        machine, versions = describe_machine(Path(folder)), describe_versions()
        print(f"{machine.cores} cores {machine.cpu}, {machine.memory_mb} MB, {machine.file_system};", end=" ")
        print(f"Python {versions.python}, nats-server {versions.nats_server}, load {load[0]:.1f}\n", flush=True)
        for name in names:
            title, run = BENCHMARKS[name]
            try:
                results[name] = list(run(Setting(Path(folder, name), arguments.quick, arguments.gigabyte)))
            except Exception as error:  # the others are still to be run
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"{title}: failed: {failed[name]}\n", file=sys.stderr, flush=True)
            else:
                print(table(title, results[name]), end="\n\n", flush=True)
    if arguments.json is not None:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started),
            "quick": arguments.quick,
            "machine": asdict(machine),
            "load_before": load,
            "load_after": os.getloadavg(),
            "versions": asdict(versions),
            "figures": {name: [to_json(figure) for figure in figures] for name, figures in results.items()},
            "failed": failed,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    missed = sum(figure.verdict == "MISSED" for figures in results.values() for figure in figures)
    met = sum(figure.verdict == "met" for figures in results.values() for figure in figures)
    print(f"{met} aims met, {missed} missed, {len(failed)} benchmarks failed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures HarmonyLite with real daemons on this machine; docs/performance.md explains each figure.",
        epilog="example: python -m benchmarks --only latency idle --json results.json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all figures to FILE")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything works, no more")
    parser.add_argument("--gigabyte", action="store_true", help="catchup: a database of 1 GB instead of 100 MB")
    parser.add_argument(
        "--folder", default="/var/tmp", metavar="DIR", help="a folder on the disk to be measured (/var/tmp)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
