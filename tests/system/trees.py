"""Root file systems of the machines that the system tests boot, made once and kept in a cache.

A tree holds Debian's base system and what the package depends on, so that a machine installs from nothing but the
repository under test: no machine has a way to the outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("HARMONYLITE_TEST_CACHE", "/var/cache/harmonylite-test"))

# The init system, and what tests call inside.
_BASE = ("systemd", "systemd-sysv", "dbus", "iproute2", "procps", "e2fsprogs", "sqlite3", "libfaketime", "sudo")
# What harmonylite depends on in Debian.
_DEPENDENCIES = (
    "adduser",
    "python3",
    "python3-apsw",
    "python3-msgpack",
    "python3-nacl",
    "python3-prometheus-client",
    "python3-sdnotify",
    "python3-zstandard",
)
# Downloaded, not installed: which NATS server a machine gets is for apt to decide.
_DEBIAN_SERVER = "nats-server"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")


@dataclass(frozen=True, slots=True)
class Tree:
    """suite: Debian's code name; architecture: Debian's name."""

    suite: str
    architecture: str = "amd64"

    @property
    def packages(self) -> tuple[str, ...]:
        return _BASE + _DEPENDENCIES

    @property
    def path(self) -> Path:
        """Where the tree is kept. Named after what is in it: a changed list makes a new tree."""
        digest = hashlib.sha256(" ".join((*self.packages, _DEBIAN_SERVER)).encode()).hexdigest()[:8]
        return CACHE / "trees" / f"{self.suite}-{self.architecture}-{digest}"

    @property
    def emulated(self) -> bool:
        native = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True)
        return native.stdout.strip() != self.architecture


def ensure(tree: Tree) -> Path:
    """The tree's path; made first if it is not in the cache (about half a minute, emulated three)."""
    with _locked(tree):
        if not tree.path.exists():
            unfinished = tree.path.with_name(f"{tree.path.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _make(tree, unfinished)
            unfinished.rename(tree.path)
    return tree.path


@contextlib.contextmanager
def _locked(tree: Tree) -> Iterator[None]:
    """Two runs on one host make a tree once."""
    tree.path.parent.mkdir(parents=True, exist_ok=True)
    with tree.path.with_name(f"{tree.path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(tree: Tree, target: Path) -> None:
    command = [
        "mmdebstrap",
        "--variant=minbase",
        f"--architectures={tree.architecture}",
        f"--include={','.join(tree.packages)}",
        "--aptopt=Acquire::Languages none",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        # Debian's own server for the machines that have no other; kept beside, see the end.
        f'--customize-hook=chroot "$1" sh -c "cd /srv && apt-get download -q {_DEBIAN_SERVER}"',
        # Every machine makes an id of its own at its first boot (machine-id(5)), and reaches no repository but ours.
        '--customize-hook=: >"$1/etc/machine-id"; rm -f "$1/etc/hostname" "$1/etc/apt/sources.list"',
        '--customize-hook=rm -rf "$1/etc/apt/sources.list.d"; mkdir "$1/etc/apt/sources.list.d"',
        # Nobody logs in, and nothing here has a cron or a mount of its own to wait for.
        '--customize-hook=ln -sf /dev/null "$1/etc/systemd/system/apt-daily.timer"',
        '--customize-hook=ln -sf /dev/null "$1/etc/systemd/system/apt-daily-upgrade.timer"',
        '--customize-hook=ln -sf /dev/null "$1/etc/systemd/system/dpkg-db-backup.timer"',
        tree.suite,
        str(target),
        *_mirror(),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"mmdebstrap of {tree} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def _mirror() -> tuple[str, ...]:
    """Where this host gets Debian from; the suite alone, without security updates: the least that can go wrong."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"],
        capture_output=True,
        text=True,
    )
    return tuple(sorted(set(listed.stdout.split()))[:1])


@contextlib.contextmanager
def emulation(*architectures: str) -> Iterator[None]:
    """Programs of these architectures (qemu's names, such as `aarch64`) run here as long as this lasts."""
    mounted = not (_BINFMT / "register").exists()
    if mounted:
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=True)
    added: list[Path] = []
    try:
        for name in architectures:
            entry = _BINFMT / f"qemu-{name}"
            if not entry.exists():
                (_BINFMT / "register").write_bytes(_binfmt_rule(name))
                added.append(entry)
        yield
    finally:
        for entry in added:
            entry.write_text("-1")
        if mounted:
            subprocess.run(["umount", str(_BINFMT)], check=True)


def _binfmt_rule(name: str) -> bytes:
    """The line of binfmt.d(5) that Debian's qemu-user-static brings: by magic, with the interpreter kept open."""
    file = Path(f"/usr/lib/binfmt.d/qemu-{name}.conf")
    return file.read_bytes().strip()
