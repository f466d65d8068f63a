"""What the Debian packages say agrees with the program: versions, dependencies, the configuration they install."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harmonylite import __version__
from harmonylite.config import ConfigError, load
from harmonylite.config.model import KEYS, value_of

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
DEBIAN = PACKAGING / "debian"
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
# PyPI -> Debian, where a name is not its own.
DEBIAN_NAMES = {"pynacl": "nacl"}


def locked(name: str) -> dict[str, list[str]]:
    """name==version -> sha256 sums, of a lock file."""
    text = re.sub(r"^#.*\n", "", (PACKAGING / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = {}
    for line in filter(None, text.splitlines()):
        pinned, *hashes = line.split()
        assert re.fullmatch(r"[a-z-]+==[\d.]+", pinned), line
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), line
        found[pinned] = hashes
    return found


def test_the_version_is_one() -> None:
    first = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"harmonylite ({__version__})")
    assert toml.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_who_made_it_is_the_same_everywhere() -> None:
    [author] = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["authors"]
    name = author["name"]
    [maintainer] = re.findall(r"^Maintainer: (.*)$", (DEBIAN / "control").read_text(), re.MULTILINE)
    [entry] = re.findall(r"^ -- (.*)  ", (DEBIAN / "changelog").read_text(), re.MULTILINE)
    assert maintainer == entry and maintainer.startswith(f"{name} <")
    for file in (ROOT / "LICENSE", DEBIAN / "copyright"):
        assert re.search(rf"^Copyright\W.*2026 {re.escape(name)}$", file.read_text(), re.MULTILINE), file


def test_what_is_downloaded_is_pinned() -> None:
    assert [len(hashes) for hashes in locked("python.lock").values()] == [1, 1]
    (server,) = locked("nats-server.lock").values()
    assert len(set(server)) == 2  # one per architecture


def test_every_dependency_is_there() -> None:
    """From Debian, or shipped in the package."""
    shipped = {pinned.split("==")[0] for pinned in (*locked("python.lock"), *locked("nats-server.lock"))}
    binary = (DEBIAN / "control").read_text().partition("\nPackage: harmonylite\n")[2].partition("\nPackage:")[0]
    depends = binary.partition("Depends:")[2].partition("\nRecommends:")[0]
    debian = dict(re.findall(r"^\s*python3-([a-z0-9-]+)(?: \(>= ([\d.]+)\))?,$", depends, re.MULTILINE))
    for dependency in toml.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, least = re.match(r"([a-z0-9-]+)>=([\d.]+)", dependency).groups()  # type: ignore[union-attr]
        if name not in shipped and name != "tomli":  # in Python since 3.11, which Debian 12 has
            assert debian[DEBIAN_NAMES.get(name, name)] == least, dependency


@pytest.fixture
def conffile(tmp_path: Path) -> Path:
    """The configuration that the package installs, made as debian/rules makes it."""
    done = subprocess.run(
        ["sed", "-f", str(DEBIAN / "config.sed"), str(ROOT / "docs/config.toml")], capture_output=True, check=True
    )
    file = tmp_path / "config.toml"
    file.write_bytes(done.stdout)
    return file


def test_nothing_is_replicated_until_somebody_says_what(conffile: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(conffile, {"node_id": 1})
    assert [problem.key for problem in caught.value.problems] == ["db_path"]


def test_the_installed_configuration_shows_every_key_and_keeps_the_defaults(conffile: Path) -> None:
    text = conffile.read_text()
    assert re.findall(r"^(?!#|\[|$).*", text, re.MULTILINE) == ['store_dir = "/var/lib/harmonylite"']
    conffile.write_text(re.sub(r"^# (db_path = )", r"\1", text, flags=re.MULTILINE))
    config = load(conffile, {"node_id": 1})
    assert config.notes == ()
    for name, key in KEYS.items():
        assert re.search(rf"^(# )?{key.short_name} = ", text, re.MULTILINE), name
        if name not in ("db_path", "node_id", "nats.store_dir"):
            assert value_of(config, name) == key.default, name


def test_the_launcher_looks_where_the_modules_are_installed() -> None:
    (library,) = re.findall(r'^LIBRARY = "(.*)"$', (PACKAGING / "launcher.py").read_text(), re.MULTILINE)
    assert f"$(DAEMON){library}/\n" in (DEBIAN / "rules").read_text()


@pytest.mark.parametrize(
    "script", [*DEBIAN.glob("harmonylite.p*"), *PACKAGING.glob("*.sh")], ids=lambda path: path.name
)
def test_the_scripts_parse(script: Path) -> None:
    shell = "bash" if script.suffix == ".sh" else "sh"
    subprocess.run([shell, "-n", str(script)], check=True)


def can_build() -> bool:
    if shutil.which("dpkg-checkbuilddeps") is None or shutil.which("dh") is None:
        return False
    done = subprocess.run(["dpkg-checkbuilddeps", str(DEBIAN / "control")], capture_output=True)
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_build(), reason="the build dependencies in packaging/debian/control are not installed")
def test_two_builds_are_the_same_to_the_byte() -> None:
    done = subprocess.run(
        ["bash", str(PACKAGING / "reproducible.sh")],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(".deb") == 3
