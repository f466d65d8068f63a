"""The configuration in force, for `check-config`. Secrets, and passwords inside addresses, are masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harmonylite.config.model import KEYS, TABLES, Config, Key, value_of
from harmonylite.config.values import MASK, Secret, ServerUrl


def _printable(value: Any) -> Any:
    if isinstance(value, Secret):
        return MASK if value else ""
    if isinstance(value, ServerUrl):
        return value.masked
    if isinstance(value, tuple):
        return [_printable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def toml_value(value: Any) -> str:
    """A value in TOML's notation; secrets are masked. A JSON string is a TOML string."""
    plain = _printable(value)
    if isinstance(plain, list):
        return "[" + ", ".join(toml_value(item) for item in plain) + "]"
    if isinstance(plain, float):
        return f"{plain:g}" if plain != int(plain) else str(int(plain))
    return json.dumps(plain, ensure_ascii=False)


def describe(config: Config) -> str:
    """Everything in force as TOML text, with a remark where a value was not written by anybody."""
    lines: list[str] = []
    for table in TABLES.values():
        if table.name:
            lines += ["", f"[{table.name}]"]
        for key in KEYS.values():
            if key.table == table.name:
                lines.append(f"{key.short_name} = {toml_value(value_of(config, key.name))}{_origin(config, key)}")
    return "\n".join(lines)


def _origin(config: Config, key: Key) -> str:
    if key.name == "node_id" and config.node_id_from_machine:
        return "  # made from the machine id"
    if key.name == "nats.store_dir" and not config.nats.store_dir and not config.external:
        return f"  # {config.data_dir}"
    return ""


def describe_data(config: Config) -> dict[str, Any]:
    """Everything in force as nested dictionaries for JSON, each table under its name."""
    tables: dict[str, dict[str, Any]] = {}
    for name in TABLES:
        tables[name] = {}
        if name:
            above, _, short = name.rpartition(".")
            tables[above][short] = tables[name]
    for key in KEYS.values():
        tables[key.table][key.short_name] = _printable(value_of(config, key.name))
    return tables[""]
