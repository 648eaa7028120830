"""Weight files as memory maps, and the one record of what is in them: regular files that lie where the folder says.

Knows no format. A folder comes from anyone, so a name in it may be a pipe that never ends or a link to something else.
Invariant: what `map_file` hands out is a regular file of the folder, or a blob of its repository in the hub's cache.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.core.errors import WeightsError

RANK_MAX = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in a file; `data` is a read-only view of the memory map, so only what is looked at is read."""

    name: str
    file: str
    data: np.ndarray[Any, np.dtype[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read when looked at. Raises WeightsError for what is no file of its folder, or empty."""
    _check_place(path)
    try:
        # Opening a pipe would wait for a writer; without waiting it is opened and refused by its kind.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(f"{path.name} is {_kind(status.st_mode)}, no file; weights are read from regular files")
        if not status.st_size:
            raise WeightsError(f"{path.name}: 0 bytes; the download is incomplete")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _check_place(path: Path) -> None:
    """A link may lead within its folder, and from a snapshot of the hub's cache to the blobs beside it."""
    if not path.is_symlink():
        return
    folder = path.parent.resolve()
    roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:     # RuntimeError: a circle, before Python 3.13
        raise WeightsError(f"{path.name} is a link that leads nowhere; the download is incomplete") from error
    if not any(target.is_relative_to(root) for root in roots):
        raise WeightsError(
            f"{path.name} is a link that leaves the model's folder; put the file itself there, or serve the folder "
            "that it is in"
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> np.ndarray[Any, Any]:
    """A tensor without elements; its other sizes may still be more than an array can have."""
    try:
        return np.empty(shape, dtype)
    except (ValueError, OverflowError) as error:
        raise WeightsError(f"{where}: {list(shape)} is not a shape") from error


def is_size(value: object) -> bool:
    """An integer that can count something; booleans are integers to Python, but no sizes."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def foreign(head: bytes) -> str:
    """What a file is that begins so, where it is often found in place of weights."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: fetch the file itself with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "a web page, likely the answer of a download that failed"
    return ""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: a key given twice is an error, not the last one's."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name[:80]!r}")
        found[name] = value
    return found
