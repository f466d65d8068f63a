"""What a benchmark yields: figures, each perhaps with an aim; their table and their JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be: at most `limit`, or at least that much."""

    limit: float
    at_least: bool = False

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {number(self.limit)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. samples: what it is the median of, or () if it is not; detail: what else was seen."""

    name: str
    value: float
    unit: str
    aim: Aim | None = None
    detail: str = ""
    samples: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "met" if self.aim.met_by(self.value) else "MISSED"


def median_of(name: str, samples: Sequence[float], unit: str, aim: Aim | None = None, detail: str = "") -> Figure:
    """The figure that is the median of `samples`."""
    return Figure(name, statistics.median(samples), unit, aim, detail, tuple(samples))


def percentile(samples: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(title: str, figures: Iterable[Figure]) -> str:
    """The figures of one benchmark, aligned for people."""
    header = (title, "", "", "aim", "")
    body = [
        (f"  {figure.name}", number(figure.value), figure.unit, str(figure.aim or ""), figure.verdict)
        for figure in figures
    ]
    details = ["", *(figure.detail for figure in figures)]
    lines = [header, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    widths[0] = max(widths[0], 46)
    rows = []
    for line, detail in zip(lines, details, strict=True):
        name, value, unit, aim, verdict = line
        row = f"{name:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {aim:<{widths[3]}}  {verdict:<6}"
        rows.append(f"{row}  {detail}".rstrip())
    return "\n".join(rows)


def to_json(figure: Figure) -> dict[str, object]:
    """The figure with its verdict; samples rounded, they are for looking at their spread."""
    found = asdict(figure)
    found["samples"] = [float(f"{sample:.5g}") for sample in figure.samples]
    found["aim"] = str(figure.aim) if figure.aim else None
    found["verdict"] = figure.verdict or None
    return found


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a benchmark may put its files (on a real disk), whether it should only show that it works, and whether
    the large database is to be a gigabyte."""

    folder: Path
    quick: bool
    gigabyte: bool = False

    def choose(self, full: int, quick: int) -> int:
        """A size or a duration."""
        return quick if self.quick else full
