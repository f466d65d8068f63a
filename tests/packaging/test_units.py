"""The units are what systemd understands, confined as far as promised, and the two say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from harmonylite.config.model import KEYS

FOLDER = Path(__file__).parents[2] / "systemd"
UNITS = ("harmonylite.service", "harmonylite@.service")
# Since systemd 254; older ones say that they ignore them.
NEWER = ("RestartSteps", "RestartMaxDelaySec")

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def settings(name: str) -> dict[str, list[str]]:
    """Directive -> its values, in their order, of all sections."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (FOLDER / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found[key].append(value)
    return dict(found)


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_no_mistake(name: str, tmp_path: Path) -> None:
    # The program is not installed here; everything else is judged as it is.
    unit = tmp_path / name
    unit.write_text((FOLDER / name).read_text().replace("/usr/bin/harmonylite", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "harmonylite" in line]
    assert [line for line in said if not any(f"'{key}'" in line for key in NEWER)] == []
    assert done.returncode == 0, done.stderr


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_the_exposure_is_at_most_1_5(name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=15", str(FOLDER / name)],
        capture_output=True,
        text=True,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot judge a file")
    assert re.search(r"exposure level for \S+: \d\.\d", done.stdout), done.stderr
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_template_is_the_unit_with_names() -> None:
    one, many = (settings(name) for name in UNITS)
    different = {key for key in one.keys() | many.keys() if one.get(key) != many.get(key)}
    assert different == {
        "CacheDirectory",
        "Description",
        "ExecStart",
        "RuntimeDirectory",
        "StateDirectory",
        "SyslogIdentifier",
    }
    for key in different - {"Description"}:
        assert many[key][0].count("%i") == 1, key
    # A runtime directory below the other unit's would go when that one stops.
    assert not many["RuntimeDirectory"][0].startswith(f"{one['RuntimeDirectory'][0]}/")


@pytest.mark.parametrize("name", UNITS)
def test_nothing_waits_for_the_network_or_the_clock(name: str) -> None:
    found = settings(name)
    ordering = " ".join(value for key in ("After", "Wants", "Requires", "BindsTo") for value in found.get(key, ()))
    assert not re.search(r"network-online|time-sync|time-wait-sync", ordering)
    assert set(found) & {"Wants", "Requires", "BindsTo", "Before"} == set()


@pytest.mark.parametrize("name", UNITS)
def test_the_user_is_the_one_that_sysusers_makes(name: str) -> None:
    kind, user, *_ = (FOLDER / "sysusers.conf").read_text().split()
    found = settings(name)
    assert (kind, found["User"], found["Group"]) == ("u", [user], [user])
    for line in (FOLDER / "tmpfiles.conf").read_text().splitlines():
        if not line.startswith("#"):
            assert line.split()[3:5] == [user, user]


@pytest.mark.parametrize("name", UNITS)
def test_the_credentials_in_the_comments_are_those_of_the_configuration(name: str) -> None:
    named = set(re.findall(r"^#LoadCredential=(\w+):", (FOLDER / name).read_text(), re.MULTILINE))
    assert named - {"seed"} <= {key.credential for key in KEYS.values()}
    assert named - {"seed"}


@needs_systemd
def test_sysusers_and_tmpfiles_make_what_they_name(tmp_path: Path) -> None:
    root = f"--root={tmp_path}"
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", root, "-"], input=(FOLDER / "sysusers.conf").read_bytes(), check=True)
    assert "harmonylite:" in (tmp_path / "etc/passwd").read_text()
