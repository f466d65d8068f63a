"""The packages and machines that the system tests share: built and booted once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.appliance import Appliance
from tests.system.machine import Disk, Farm
from tests.system.trees import CACHE, Tree, emulation

ROOT = Path(__file__).parents[2]
OLD_VERSION = "0.0.9"
SMALL = Disk("/small", 16)
TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "dpkg-buildpackage": "dpkg-dev",
    "reprepro": "reprepro",
    "piuparts": "piuparts",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.system)
            # The first one also waits for Debian to be unpacked and the packages to be built.
            item.add_marker(pytest.mark.timeout(900))


@dataclass(frozen=True, slots=True)
class Pair:
    """A hub and a leaf that replicate."""

    hub: Appliance
    leaf: Appliance

    @property
    def both(self) -> tuple[Appliance, Appliance]:
        return self.hub, self.leaf


@pytest.fixture(scope="session")
def repositories() -> Iterator[Path]:
    """A folder with two signed repositories of this source: `apt`, and `apt-old` with a lower version number.

    HARMONYLITE_TEST_PACKAGES names one that is kept between runs, for work on the tests themselves.
    """
    if os.geteuid() != 0:
        pytest.fail("the system tests boot machines: run them as root")
    lacking = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if lacking:
        pytest.fail(f"missing: apt-get install {' '.join(lacking)}")
    kept = os.environ.get("HARMONYLITE_TEST_PACKAGES")
    if kept:
        if not Path(kept, "apt-old").exists():
            _make_repositories(Path(kept))
        yield Path(kept)
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"packages-{os.getpid()}-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        _make_repositories(folder)
        yield folder


def _make_repositories(folder: Path) -> None:
    _make_repository(folder / "apt", folder / "new")
    _make_repository(folder / "apt-old", folder / "old", "--version", OLD_VERSION, "--arch", "amd64")


def _make_repository(repository: Path, packages: Path, *options: str) -> None:
    for command in (
        ("packaging/build-deb.sh", "--no-lintian", "--out", str(packages), *options),
        ("packaging/apt-repo.sh", "--packages", str(packages), "--out", str(repository)),
    ):
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}: {done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def farm(repositories: Path) -> Iterator[Farm]:
    farm = Farm((f"{repositories}/apt:/srv/apt", f"{repositories}/apt-old:/srv/apt-old"))
    try:
        yield farm
    finally:
        farm.close()


@pytest.fixture(scope="session")
def pair(farm: Farm) -> Pair:
    """A hub with Debian 12 and a leaf with Debian 13, set up as the documentation says, replicating."""
    hub = Appliance(farm.machine("hub", Tree("bookworm")), 1)
    leaf = Appliance(farm.machine("leaf", Tree("trixie"), disks=(SMALL,)), 2)
    for node in (hub, leaf):
        node.make_application()
        node.use_repository()
        node.apt("install", "harmonylite")
    hub.setup()
    hub.set("leaf_listen", '"0.0.0.0:7422"')
    leaf.setup("--leaf-servers", f"nats-leaf://{hub.machine.address}:7422")
    for node in (hub, leaf):
        node.enable()
    for node in (hub, leaf):
        node.wait_status()
    return Pair(hub, leaf)


@pytest.fixture(scope="session")
def emulated() -> Iterator[None]:
    """Programs for 64-bit and 32-bit ARM run here."""
    if not Path("/usr/bin/qemu-aarch64-static").exists():
        pytest.fail("missing: apt-get install qemu-user-static arch-test")
    with emulation("aarch64", "arm"):
        yield
