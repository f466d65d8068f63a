"""The file system that a folder is on, as the kernel's mount table tells."""

from __future__ import annotations

from pathlib import Path


def mount_of(folder: Path, table: Path = Path("/proc/self/mountinfo")) -> tuple[str, tuple[str, ...]]:
    """(type, mount options) of the file system that holds `folder`; ("", ()) if unknown. Format: proc(5)."""
    real = folder.resolve()
    best: tuple[int, str, tuple[str, ...]] = (-1, "", ())
    try:
        lines = table.read_text("utf-8", "replace").splitlines()
    except OSError:
        return "", ()
    for line in lines:
        fields, _, tail = line.partition(" - ")
        parts = fields.split(" ")
        if len(parts) < 6 or not tail:
            continue
        point = Path(parts[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        # A later mount on the same point hides the earlier one.
        if real.is_relative_to(point) and len(point.parts) >= best[0]:
            kind, *rest = tail.split(" ")
            # After an error (ext4's errors=remount-ro) the file system is read-only, not the mount: the last field,
            # with a word of its own since Linux 6.16.
            failed = ("ro",) if rest and {"ro", "emergency_ro"} & set(rest[-1].split(",")) else ()
            best = (len(point.parts), kind, (*parts[5].split(","), *failed))
    return best[1], best[2]


def is_read_only(folder: Path, table: Path = Path("/proc/self/mountinfo")) -> bool:
    """Can nothing be written on the folder's file system, by how it was mounted or since the kernel found errors in it?

    The table is looked at because statvfs(3) does not tell of errors since Linux 6.16. Raises OSError.
    """
    return "ro" in mount_of(folder, table)[1]
