"""The benchmarks run, and what they print and write is what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import Aim, Figure, median_of, number, percentile, table, to_json
from benchmarks.workload import INTEGER_KEY, TEXT_KEY, UNIQUE_INDEX, reading_bytes

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *names: str) -> tuple[str, dict[str, list[dict[str, object]]]]:
    """What a quick run of some benchmarks prints, and its figures by benchmark."""
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--folder", str(tmp_path), "--json", str(results)]
    done = subprocess.run([*command, "--only", *names], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(results.read_text())
    assert set(report) >= {"date", "machine", "versions", "figures", "load_before", "load_after"}
    assert not report["failed"]
    assert list(report["figures"]) == list(names)
    figures: dict[str, list[dict[str, object]]] = report["figures"]
    assert all(isinstance(figure["value"], float) for found in figures.values() for figure in found)
    return done.stdout, figures


def test_latency_with_real_daemons(tmp_path: Path) -> None:
    printed, figures = run(tmp_path, "latency")
    delays = {figure["name"]: figure["value"] for figure in figures["latency"]}
    assert 0 < delays["p50"] <= delays["p95"] <= delays["p99"] <= delays["largest"]
    for figure in figures["latency"]:
        assert str(figure["name"]) in printed


@pytest.mark.slow
def test_bytes_in_the_stream_are_counted(tmp_path: Path) -> None:
    _, figures = run(tmp_path, "wire")
    bulk, single = (figure["value"] for figure in figures["wire"])
    assert 0 < bulk < 40 < single, "a row of 40 bytes is compressed in bulk, and carries a message's frame alone"


@pytest.mark.slow
def test_catching_up_is_measured_for_every_kind_of_device(tmp_path: Path) -> None:
    """A benchmark that compares the device's rows with the hub's, and fails if they are not the same."""
    _, figures = run(tmp_path, "catchup")
    found = {str(figure["name"]): figure["value"] for figure in figures["catchup"]}
    stored = [figure for figure in figures["catchup"] if figure["name"] == "snapshot: database"]
    assert 3 < stored[0]["value"] < 6, "20,000 rows of 200 bytes"  # type: ignore[operator]
    for device in ("new, no file", "missed 2,000 changes", "new, with the schema"):
        assert 0 < found[f"{device}: over the link"] < 6, "MB"  # type: ignore[operator]
        assert found[f"{device}: peak memory of the daemon"] > 20  # type: ignore[operator]
        assert found[f"{device}: longest write of the application"] > 0  # type: ignore[operator]


@pytest.mark.slow
def test_cost_of_capture_is_measured_for_every_kind_of_table(tmp_path: Path) -> None:
    _, figures = run(tmp_path, "write")
    names = [str(figure["name"]) for figure in figures["write"]]
    for kind in (INTEGER_KEY, TEXT_KEY, UNIQUE_INDEX):
        for what in ("insert", "update"):
            assert len([name for name in names if name.startswith(f"{what}, {kind.name}")]) >= 2
    assert all(figure["value"] > 0 and len(figure["samples"]) == 3 for figure in figures["write"])  # type: ignore


def test_an_aim_can_be_met_and_missed() -> None:
    assert Aim(5.0).met_by(5.0)
    assert not Aim(5.0).met_by(5.1)
    assert Aim(100, at_least=True).met_by(100)
    assert not Aim(100, at_least=True).met_by(99)
    assert Figure("f", 6.0, "ms", Aim(5.0)).verdict == "MISSED"
    assert Figure("f", 6.0, "ms").verdict == ""


def test_figures_in_a_table_and_as_json() -> None:
    figure = median_of("rate", [10.0, 30.0, 123456.789], "rows/s", Aim(20, at_least=True), "a detail")
    lines = table("speed", [figure, Figure("other", 0.0123, "s")]).splitlines()
    assert lines[1].split() == ["rate", "30", "rows/s", ">=", "20", "met", "a", "detail"]
    assert lines[2].split() == ["other", "0.0123", "s"]
    assert lines[1].index("30") + 2 == lines[2].index("0.0123") + 6, "values are aligned on the right"
    assert to_json(figure)["samples"] == [10.0, 30.0, 123460.0]
    assert to_json(figure)["verdict"] == "met"


def test_percentiles_and_numbers() -> None:
    samples = [float(n) for n in range(1, 101)]
    assert [percentile(samples, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.99) == 7.0
    assert [number(value) for value in (0.0123, 1.234, 99.96, 123456.7)] == ["0.0123", "1.23", "100", "123,457"]


@pytest.mark.parametrize("kind", [INTEGER_KEY, TEXT_KEY, UNIQUE_INDEX], ids=lambda kind: kind.name)
def test_readings_are_the_same_every_time_and_their_keys_differ(kind) -> None:  # type: ignore[no-untyped-def]
    readings = kind.readings(0, 3000)
    assert readings == [*kind.readings(0, 1000), *kind.readings(1000, 2000)]
    assert len({reading[0] for reading in readings}) == 3000
    if kind.unique:
        assert len({reading[1] for reading in readings}) == 3000
    assert reading_bytes((1, "a", 2.0, 3, "ä")) == 8 + 1 + 8 + 8 + 2
