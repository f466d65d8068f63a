"""What SIGHUP takes over from a changed configuration file, and what counts only after a restart.

Which keys are taken over stands with each key (`live` in config/model).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from harmonylite.config import Config
from harmonylite.config.model import KEYS, value_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Changes:
    """Dotted keys whose values differ. live: taken over; restart: not before a restart."""

    live: tuple[str, ...]
    restart: tuple[str, ...]


def compare(running: Config, fresh: Config) -> Changes:
    """What differs between the configuration in force and the one read just now."""
    different = [name for name in KEYS if value_of(running, name) != value_of(fresh, name)]
    return Changes(
        live=tuple(name for name in different if KEYS[name].live),
        restart=tuple(name for name in different if not KEYS[name].live),
    )


def taken_over(running: Config, fresh: Config, names: tuple[str, ...]) -> Config:
    """The configuration in force with the values that `fresh` has for `names`."""
    for name in names:
        running = _with(running, name.split("."), value_of(fresh, name))
    return running


def _with(settings: T, path: list[str], value: object) -> T:
    name, *below = path
    if below:
        value = _with(getattr(settings, name), below, value)
    return dataclasses.replace(settings, **{name: value})  # type: ignore[type-var]
