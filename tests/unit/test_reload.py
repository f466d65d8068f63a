"""What SIGHUP takes over, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

from harmonylite.config import Config, load
from harmonylite.config.model import KEYS, value_of
from harmonylite.reload import compare, taken_over

LIVE = {
    *("scan_max_changes", "cleanup_interval", "sleep_timeout", "polling_interval", "tombstone_retention"),
    *("max_transaction_bytes", "logging.verbose", "logging.format"),
}


def configured(folder: Path, text: str) -> Config:
    file = folder / "config.toml"
    file.write_text(f'db_path = "{folder / "app.db"}"\nnode_id = 1\n{text}')
    return load(file)


def test_live_keys_are_taken_over_and_the_others_are_named(tmp_path: Path) -> None:
    running = configured(tmp_path, "[nats]\nuser_name = 'a'\nuser_password = 'old'")
    fresh = configured(
        tmp_path,
        "scan_max_changes = 9\npublish = false\n[logging]\nverbose = true\n[nats]\nuser_name = 'a'\n"
        "user_password = 'new'\n",
    )
    found = compare(running, fresh)
    assert set(found.live) == {"scan_max_changes", "logging.verbose"}
    assert set(found.restart) == {"publish", "nats.user_password"}
    taken = taken_over(running, fresh, found.live)
    assert (taken.scan_max_changes, taken.logging.verbose) == (9, True)
    assert (taken.publish, taken.nats.user_password.reveal()) == (True, "old")
    assert compare(taken, fresh).live == ()
    assert compare(running, running) == compare(taken, taken)


def test_which_keys_are_live() -> None:
    assert {key.name for key in KEYS.values() if key.live} == LIVE


def test_every_live_key_can_be_taken_over(tmp_path: Path) -> None:
    running = configured(tmp_path, "")
    fresh = configured(
        tmp_path,
        "scan_max_changes = 9\ncleanup_interval = 100\nsleep_timeout = 7\npolling_interval = 8\n"
        "tombstone_retention = 2\nmax_transaction_bytes = 100000\n[logging]\nverbose = true\nformat = 'json'\n",
    )
    taken = taken_over(running, fresh, compare(running, fresh).live)
    for name in LIVE:
        assert value_of(taken, name) == value_of(fresh, name) != value_of(running, name)
