"""Files beside the database: packed, unpacked, found again, removed."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from harmonylite.snapshot import workfiles
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.workfiles import (
    NoRoom,
    SnapshotFailed,
    Stopped,
    WorkFiles,
    check_room,
    pack,
    stoppable,
    unpack,
)

ID, OTHER = "20261124T074500Z-7-1a2b3c4d", "20261124T074501Z-7-1a2b3c4d"


def ignore(done: int, total: int) -> None:
    pass


def content(path: Path, size: int = 3_000_000) -> bytes:
    data = os.urandom(size // 2) + bytes(size - size // 2)
    path.write_bytes(data)
    return data


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    data = content(tmp_path / "plain")
    seen: list[tuple[int, int]] = []
    packed = pack(tmp_path / "plain", tmp_path / "packed", threading.Event(), lambda *step: seen.append(step))
    assert packed.size == len(data) == seen[-1][0] == seen[-1][1]
    assert packed.stored_size == (tmp_path / "packed").stat().st_size < len(data)
    unpack(tmp_path / "packed", tmp_path / "again", packed.size, threading.Event(), ignore)
    assert (tmp_path / "again").read_bytes() == data


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "shorter"])
def test_a_damaged_file_is_not_unpacked(tmp_path: Path, damage: str) -> None:
    data = content(tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", threading.Event(), ignore)
    size = (tmp_path / "packed").stat().st_size
    if damage == "cut":
        os.truncate(tmp_path / "packed", size // 2)
    elif damage == "flipped":
        with (tmp_path / "packed").open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 8]))
    claimed = len(data) + {"longer": 1, "shorter": -1}.get(damage, 0)
    with pytest.raises(SnapshotFailed):
        unpack(tmp_path / "packed", tmp_path / "again", claimed, threading.Event(), ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain"]


def test_work_that_nobody_waits_for_ends_and_leaves_nothing(tmp_path: Path) -> None:
    content(tmp_path / "plain", 20_000_000)

    async def main() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(begun.set)

        task = asyncio.create_task(
            stoppable(lambda stop: pack(tmp_path / "plain", tmp_path / "packed", stop, progress))
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not (tmp_path / "packed").exists(), "it went on, or left something"

    asyncio.run(main())
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Stopped):
        pack(tmp_path / "plain", tmp_path / "packed", stopped, ignore)


def test_what_a_killed_daemon_leaves_is_found_or_removed(tmp_path: Path) -> None:
    """Also for a database whose name has wildcards in it."""
    db = tmp_path / "app[1]*.db"
    files, others = WorkFiles(db), WorkFiles(tmp_path / "app.db")
    db.touch()
    useful = [files.download(ID), Path(f"{files.unpacked(ID)}.part"), files.unpacked(OTHER)]
    useless = [
        files.copy,
        files.packed,
        files.adopted,
        Path(f"{files.unpacked('20261124T074502Z-7-1a2b3c4d')}.part"),
        Path(f"{files.copy}-journal"),
    ]
    foreign = [others.copy, others.download(ID), tmp_path / ".app[1]*.db.else"]
    for path in (*useful, *useless, *foreign):
        path.touch()
    files.mirror.mkdir()
    (files.mirror / "part").touch()
    files.tidy()
    assert sorted(tmp_path.iterdir()) == sorted([db, *useful, *foreign])
    assert files.downloads() == [OTHER, ID]
    asyncio.run(files.keep_only(ID))
    assert sorted(tmp_path.iterdir()) == sorted([db, *useful[:2], *foreign])


def test_unpacking_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a power cut that left something else of the last bytes."""
    data = content(tmp_path / "plain", 8 << 20)
    pack(tmp_path / "plain", tmp_path / "packed", threading.Event(), ignore)
    part, again = tmp_path / "again.part", tmp_path / "again"
    written: list[int] = []
    write = workfiles._write
    monkeypatch.setattr(workfiles, "_write", lambda file, piece: (written.append(len(piece)), write(file, piece)))

    def unpack_for(size: int) -> None:
        stop = threading.Event()
        unpack(tmp_path / "packed", again, len(data), stop, lambda done, _: stop.set() if done >= size else None)

    with pytest.raises(Stopped):
        unpack_for(3 << 20)
    assert not again.exists()
    assert part.read_bytes() == data[: sum(written)]
    with part.open("r+b") as torn:
        torn.seek(-4096, os.SEEK_END)
        torn.write(bytes([1]) * 4096)
    first, written[:] = sum(written), []
    with pytest.raises(Stopped):
        unpack_for(5 << 20)
    assert sum(written) < first, "what was there is not written again"
    with part.open("ab") as longer:
        longer.write(bytes([2]) * (8 << 20))
    unpack(tmp_path / "packed", again, len(data), threading.Event(), ignore)
    assert again.read_bytes() == data
    assert not part.exists()


def test_large_files_are_removed_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever is cancelled meanwhile leaves nobody behind who would remove the next one's file."""
    mine, folder = tmp_path / "mine", tmp_path / "folder"
    inside, go_on = threading.Event(), threading.Event()
    unlink = workfiles._remove

    def slowly(paths: list[Path]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        inside.set()
        assert go_on.wait(10)
        unlink(paths)

    monkeypatch.setattr(workfiles, "_remove", slowly)

    async def main() -> None:
        for path in (mine, Path(f"{mine}-wal"), Path(f"{mine}-journal")):
            path.write_text("old")
        folder.mkdir()
        (folder / "in it").touch()
        removing = asyncio.create_task(workfiles.remove(mine, folder, tmp_path / "never there"))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        removing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await removing
        assert not mine.exists()
        mine.write_text("new")
        folder.mkdir()
        go_on.set()

    try:
        asyncio.run(main())
    finally:
        go_on.set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mine"]
    assert mine.read_text() == "new"


def test_a_disk_without_room_is_told_from_one_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path, 1, "nothing")
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    with pytest.raises(NoRoom, match="make room"):
        check_room(tmp_path, free + 1, "a snapshot")
    monkeypatch.setattr(workfiles, "ROOM_LEFT_BYTES", free)
    with pytest.raises(NoRoom):
        check_room(tmp_path, 1 << 30, "a snapshot")


@pytest.mark.parametrize(
    ("own_mb", "has_room"),
    [(None, True), (100, True), (60, True), (40, False), (0, False)],
    ids=["no database", "as large", "to grow by what is packed", "to grow by more", "empty"],
)
def test_what_the_database_grows_by_is_not_taken_from_the_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_mb: int | None, has_room: bool
) -> None:
    """A merge on a disk that is full waits for room, and so does the application, while the snapshot takes it up."""
    files, megabyte = WorkFiles(tmp_path / "app.db"), 1_000_000
    if own_mb is not None:
        with (tmp_path / "app.db").open("wb") as file:
            file.truncate(own_mb * megabyte)
    manifest = Manifest(
        id=ID,
        node_id=7,
        version="1",
        created_ms=0,
        positions=(),
        schema="",
        size=100 * megabyte,
        stored_size=50 * megabyte,
        sha256="0" * 64,
        tombstones_since_ms=0,
    )
    asked: list[int] = []
    monkeypatch.setattr(workfiles, "check_room", lambda folder, needed, what: asked.append(needed))
    files.check_room(manifest)
    assert (asked[0] <= 150 * megabyte) == has_room
    files.download(ID).write_bytes(bytes(megabyte))
    files.check_room(manifest)
    assert asked[1] == asked[0] - megabyte
