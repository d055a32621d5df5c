"""Content-addressed files: what is stored is named by its SHA-256, never changed, and checked when asked."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path


class ObjectIsDamaged(RuntimeError):
    """A stored file no longer has the digest it is named by."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over the sorted (relative path, size, SHA-256) of every file in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = [[p.relative_to(folder).as_posix(), p.stat().st_size, file_digest(p)] for p in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder with everything in it, to disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for a folder's entries
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(source: Path, target: Path, alike: Path | None) -> None:
    """Copy a file or a folder. Not shutil.copytree: it wraps errors, and nobody sees that the disk is full.

    alike: an object with files in common; what is equal there, at the same place, is linked and takes no room.
    """
    if source.is_dir():
        target.mkdir()
        for child in source.iterdir():
            _copy(child, target / child.name, alike / child.name if alike else None)
    elif alike and alike.is_file() and filecmp.cmp(source, alike, shallow=False):
        os.link(alike, target)
    else:
        shutil.copyfile(source, target)


class Objects:
    """A folder of objects; each is a file or a folder of files, read-only, at <first two hex>/<digest>."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return where the object with this digest lies; KeyError where there is none."""
        place = self.root / digest[:2] / digest
        if not place.exists():
            raise KeyError(f"No object {digest} in {self.root}.")
        return place

    def put(self, source: Path, alike: Path | None = None) -> str:
        """Copy a file or folder in, synced and renamed whole; return its digest. The same content is kept once.

        alike: an object's folder whose equal files are linked instead of copied.
        """
        digest = folder_digest(source) if source.is_dir() else file_digest(source)
        place = self.root / digest[:2] / digest
        if place.exists():
            return digest
        place.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix="new-") as temporary:
            copy = Path(temporary) / "object"
            _copy(source, copy, alike)
            for file in [copy] if copy.is_file() else [p for p in copy.rglob("*") if p.is_file()]:
                file.chmod(stat.S_IRUSR)
            sync(copy)
            os.replace(copy, place)
        sync(place.parent)
        return digest

    def put_bytes(self, content: bytes) -> str:
        """Store bytes as a file object and return its digest."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix="new-") as temporary:
            file = Path(temporary) / "content"
            file.write_bytes(content)
            return self.put(file)

    def verify(self, digest: str) -> Path:
        """Return the object's path after reading it whole; ObjectIsDamaged if its content has changed."""
        place = self.path(digest)
        found = folder_digest(place) if place.is_dir() else file_digest(place)
        if found != digest:
            raise ObjectIsDamaged(
                f"Object {digest} now has digest {found}; its files were changed. Restore {place} from a backup."
            )
        return place
