"""May the daemon's account use a database, and may the application still use what the daemon creates beside it?

By permission bits, as the kernel looks at them. The -wal and -shm files are created by whoever opens the database
first, with the database's mode (https://sqlite.org/src/file/src/os_unix.c, findCreateFileMode) and, in a directory
with the setgid bit, with the directory's group: so what both share must be a group.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCOUNT = "harmonylite"
# Where the unit's ProtectHome= shows the daemon nothing (systemd.exec(5)).
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
# Where its PrivateTmp= shows it a directory of its own.
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))


@dataclass(frozen=True, slots=True)
class Account:
    """A user with its groups. gids: the primary one, `gid`, and all others."""

    name: str
    uid: int
    gid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    gid: int


@dataclass(frozen=True, slots=True)
class Missing:
    """A permission that is missing. text: whose and what for; commands: shell commands that mend it, as root."""

    path: Path
    text: str
    commands: tuple[str, ...]


def account(name: str, extra_gids: frozenset[int] = frozenset()) -> Account | None:
    """The account of this name, with what the group database and `extra_gids` add; None if there is none."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    member = frozenset(group.gr_gid for group in grp.getgrall() if name in group.gr_mem)
    return Account(name, entry.pw_uid, entry.pw_gid, member | extra_gids | {entry.pw_gid})


def group_of(database: Path, daemon: Account) -> Group:
    """The group through which both get at the database: the directory's, else the file's, else the daemon's own.

    root's group is none of them: it would give a daemon far more than a database.
    """
    for path in (database.parent, database):
        try:
            gid = path.stat().st_gid
        except OSError:
            continue
        if gid != 0:
            return Group(_group_name(gid), gid)
    return Group(_group_name(daemon.gid), daemon.gid)


def named_group(name: str) -> Group | None:
    try:
        return Group(name, grp.getgrnam(name).gr_gid)
    except KeyError:
        return None


def is_below(path: Path, folders: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def missing(database: Path, daemon: Account, group: Group) -> Iterator[Missing]:
    """Everything that keeps the daemon from the database, or would keep the application from it later.

    database: its real path; daemon: with every group that its unit gives it; group: what both are to share.
    """
    folder = database.parent
    if not is_below(database, HOMES):  # there the drop-in shows the daemon the directory without those above it
        yield from _closed_parents(folder, daemon)
    try:
        yield from _folder(folder, daemon, group)
        owner = folder.stat().st_uid
        if database.exists():
            owner = database.stat().st_uid
            yield from _database(database, daemon, group)
        for suffix in ("-wal", "-shm"):
            companion = Path(f"{database}{suffix}")
            if companion.exists():
                yield from _file(companion, daemon, group)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        yield Missing(folder, f"cannot be looked into by this user: {error.filename}", ("run it as root",))
        return
    yield from _membership(folder, owner, daemon, group)


def _closed_parents(folder: Path, daemon: Account) -> Iterator[Missing]:
    for above in reversed(folder.parents):
        try:
            state = above.stat()
        except PermissionError:
            return
        if not _may(state, daemon, stat.S_IXOTH) and not _has_list(above):
            text = f"{daemon.name} may not pass through it (mode {_mode(state)})"
            yield Missing(above, text, (f"chmod {'ugo'[2 - _class(state, daemon)]}+x {_quoted(above)}",))


def _folder(folder: Path, daemon: Account, group: Group) -> Iterator[Missing]:
    state = folder.stat()
    commands: list[str] = []
    reasons: list[str] = []
    if not _may(state, daemon, stat.S_IRWXO) and not _has_list(folder):
        reasons.append(f"{daemon.name} may not create the -wal and -shm files there ({_described(state)})")
        if state.st_gid != group.gid:
            commands.append(f"chgrp {group.name} {_quoted(folder)}")
        commands.append(f"chmod g+rwxs {_quoted(folder)}")
    elif daemon.uid != 0 and not _creates_in(state, daemon, group):
        reasons.append(
            f"what {daemon.name} creates there would not get the group {group.name}, and be closed to the application"
            f" ({_described(state)})"
        )
        if state.st_gid != group.gid:
            commands.append(f"chgrp {group.name} {_quoted(folder)}")
        commands.append(f"chmod g+s {_quoted(folder)}")
    if reasons:
        yield Missing(folder, "; ".join(reasons), tuple(commands))


def _creates_in(folder: os.stat_result, daemon: Account, group: Group) -> bool:
    """Does a file that the daemon creates in the folder get the group?"""
    if folder.st_mode & stat.S_ISGID:
        return folder.st_gid == group.gid
    return daemon.gid == group.gid


def _database(database: Path, daemon: Account, group: Group) -> Iterator[Missing]:
    found = list(_file(database, daemon, group))
    yield from found
    state = database.stat()
    if not found and not state.st_mode & stat.S_IWGRP and state.st_uid != daemon.uid:
        # The daemon may use it some other way (as everybody), but the companions get this mode.
        text = f"its -wal and -shm files would be closed to the group {group.name} (mode {_mode(state)})"
        yield Missing(database, text, (f"chmod g+rw {_quoted(database)}",))


def _file(file: Path, daemon: Account, group: Group) -> Iterator[Missing]:
    state = file.stat()
    if _may(state, daemon, stat.S_IROTH | stat.S_IWOTH) or _has_list(file):
        return
    commands = [] if state.st_gid == group.gid else [f"chgrp {group.name} {_quoted(file)}"]
    if state.st_mode & (stat.S_IRGRP | stat.S_IWGRP) != stat.S_IRGRP | stat.S_IWGRP:
        commands.append(f"chmod g+rw {_quoted(file)}")
    if not commands:  # the group has it, but the daemon is not in the group
        commands.append(f"usermod -aG {group.name} {daemon.name}")
    yield Missing(file, f"{daemon.name} may not read and write it ({_described(state)})", tuple(commands))


def _membership(folder: Path, owner: int, daemon: Account, group: Group) -> Iterator[Missing]:
    """The application's user, taken to be the one whom the database belongs to, must be in the group too."""
    if owner in (0, daemon.uid):
        return
    try:
        application = account(pwd.getpwuid(owner).pw_name)
    except KeyError:
        return
    if application is not None and group.gid not in application.gids:
        text = f"{application.name}, whom the database belongs to, is not in the group {group.name}"
        yield Missing(
            folder,
            f"{text}: it could not open the -wal and -shm files that {daemon.name} creates",
            (f"usermod -aG {group.name} {application.name}",),
        )


def _may(state: os.stat_result, user: Account, wanted: int) -> bool:
    """Whether the permission bits give the user `wanted`, bits of the class "other"."""
    shift = 3 * _class(state, user)
    return user.uid == 0 or state.st_mode & wanted << shift == wanted << shift


def _class(state: os.stat_result, user: Account) -> int:
    """2: the owner's bits count, 1: the group's, 0: the others'. The first that fits alone (path_resolution(7))."""
    if state.st_uid == user.uid:
        return 2
    return 1 if state.st_gid in user.gids else 0


def _has_list(path: Path) -> bool:
    """Access control lists are not interpreted: they are the work of somebody who knows."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _described(state: os.stat_result) -> str:
    return f"user {_user_name(state.st_uid)}, group {_group_name(state.st_gid)}, mode {_mode(state)}"


def _mode(state: os.stat_result) -> str:
    return f"{stat.S_IMODE(state.st_mode):04o}"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
