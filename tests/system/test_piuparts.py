"""piuparts, Debian's own test of a package's life: installed, upgraded, removed and purged in a chroot, which must look
as before afterwards. `test_packages.py` does that with a running system and with databases; this one has no init."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.system.conftest import OLD_VERSION
from tests.system.trees import CACHE, Tree, ensure

# Left by apt's preconfiguring of whatever package has debconf templates, on Debian 13.
_NOT_OURS = r"/var/cache/debconf/tmp\.ci/?"


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_installed_upgraded_and_purged_nothing_is_left(repositories: Path, suite: str) -> None:
    lower = ensure(Tree(suite))
    old = repositories / "apt-old"
    packages = [next((repositories / "new").glob(name)) for name in ("harmonylite_*_all.deb", "*-server_*_amd64.deb")]
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"packages-{os.getpid()}-") as name:
        folder = Path(name)
        for part in ("upper/etc/apt/sources.list.d", "work", "root", "tmp"):
            (folder / part).mkdir(parents=True)
        for part in (folder / "upper").rglob("*"):
            part.chmod(0o755)
        key = old / "harmonylite-archive-keyring.pgp"
        source = folder / "upper/etc/apt/sources.list.d/harmonylite.list"
        source.write_text(f"deb [signed-by={key}] file:{old} {suite} main\n")
        command = (
            "piuparts",
            f"--existing-chroot={folder / 'root'}",
            f"--tmpdir={folder / 'tmp'}",
            f"--distribution={suite}",
            f"--bindmount={old}",
            "--keep-sources-list",  # the one above: there is no way to Debian's
            "--skip-minimize",
            "--no-eatmydata",
            f"--ignore-regex={_NOT_OURS}",
            *map(str, packages),
        )
        layers = f"lowerdir={lower},upperdir={folder / 'upper'},workdir={folder / 'work'}"
        script = f"mount -t overlay overlay -o {shlex.quote(layers)} {folder / 'root'}; exec {shlex.join(command)}"
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-ec", script], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "PASS: Installation, upgrade and purging tests." in done.stdout
    assert OLD_VERSION in done.stdout, "the upgrade was from the earlier version"
