"""`doctor` about the service: what of its confinement and its groups keeps it from the database."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonylite.cli import permissions, service, setup
from harmonylite.cli.checks import Check
from harmonylite.cli.permissions import Account, Group
from harmonylite.config import load

DAEMON = Account("harmonylite", 54_321, 54_321, frozenset({54_321}))
OURS = Group("ours", os.getegid() or 54_400)
Checks = Callable[..., list[Check]]


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checks:
    """What is found about harmonylite@shop.service with these properties, beside those of the packaged unit."""
    folder = tmp_path / "home" / "app"
    folder.mkdir(parents=True)
    os.chown(folder, -1, OURS.gid)
    folder.chmod(0o2770)
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "shop.toml").write_text(f'db_path = "{folder}/app.db"\nnode_id = 1\n')
    monkeypatch.setattr(setup, "CONFIG_DIRECTORY", etc)
    monkeypatch.setattr(permissions, "account", lambda name: DAEMON)
    monkeypatch.setattr(permissions, "named_group", lambda name: OURS if name == OURS.name else None)
    monkeypatch.setattr(permissions, "group_of", lambda database, daemon: OURS)
    monkeypatch.setattr(permissions, "_closed_parents", lambda folder, daemon: iter(()))
    unit = {"LoadState": "loaded", "User": "harmonylite", "ProtectSystem": "strict", "ProtectHome": "yes"}

    def find(**properties: str) -> list[Check]:
        given = {name: value.replace("FOLDER", str(folder)) for name, value in properties.items()}
        monkeypatch.setattr(service, "show", lambda name: {**unit, **given})
        return list(service.checks(load(etc / "shop.toml")))

    return find


def test_what_setup_writes_is_found_right(checks: Checks) -> None:
    found = checks(SupplementaryGroups="ours", ReadWritePaths="/srv FOLDER")
    assert [(one.level, one.advice) for one in found] == [("ok", "")]
    assert "harmonylite@shop.service may use the database, as harmonylite and group ours" in found[0].text


def test_without_a_drop_in(checks: Checks) -> None:
    [found] = checks()
    assert (found.level, found.text.endswith("(ProtectSystem=strict, and no ReadWritePaths)")) == ("fail", True)
    assert found.advice.startswith("harmonylite setup --db /") and found.advice.endswith(" --instance shop")


def test_a_group_that_the_unit_is_not_in(checks: Checks) -> None:
    [found] = checks(ReadWritePaths="FOLDER", SupplementaryGroups="audio")
    assert (found.level, "is not in the group ours" in found.text) == ("fail", True)


def test_a_home_is_hidden_unless_the_directory_is_bound(
    checks: Checks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "HOMES", (tmp_path / "home",))
    shared = {"SupplementaryGroups": "ours", "ReadWritePaths": "FOLDER"}
    for hides in ("yes", "tmpfs"):
        [found] = checks(ProtectHome=hides, **shared)
        assert (found.level, f"(ProtectHome={hides})" in found.text) == ("fail", True)
    assert [one.level for one in checks(ProtectHome="tmpfs", BindPaths="FOLDER:FOLDER:rbind", **shared)] == ["ok"]


def test_permissions_are_those_that_setup_finds(checks: Checks, tmp_path: Path) -> None:
    (tmp_path / "home" / "app").chmod(0o750)
    [found] = checks(ReadWritePaths="FOLDER", SupplementaryGroups="ours")
    assert (found.name, found.level) == ("permissions", "fail")
    assert found.advice == f"chmod g+rwxs {tmp_path}/home/app"


def test_no_unit_no_finding(checks: Checks) -> None:
    assert checks(LoadState="not-found") == []


def test_the_unit_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert service.unit_of(Path("/etc/harmonylite/config.toml")) == "harmonylite.service"
    assert service.unit_of(Path("/etc/harmonylite/shop.toml")) == "harmonylite@shop.service"
    assert service.unit_of(Path("/home/me/config.toml")) is None
    assert service.unit_of(None) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert service.show("harmonylite.service") == {}
