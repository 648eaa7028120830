"""Files in torch.save's format, assembled by hand: also those that torch would never write.

`write_torch` takes a pickle's bytes, or a dict of what `tensor` gives.
"""

from __future__ import annotations

import itertools
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.weights import torch_bin


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def plain(value: Any) -> bytes:
    """An integer, a boolean, text, a tuple, or opcodes that are given."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, str):
        return text(value)
    return b"(" + b"".join(plain(item) for item in value) + b"t"


def storage(*, dtype: str = "FloatStorage", key: str = "0", count: int = 6) -> bytes:
    """A persistent id of a storage."""
    return plain(("storage", f"ctorch\n{dtype}\n".encode(), key, "cpu", count)) + b"Q"


def tensor(
    *, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0, storage: bytes | None = None
) -> bytes:
    """A call of _rebuild_tensor_v2; the strides are those of contiguous memory unless given."""
    if strides is None:
        strides = tuple(itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=1))[::-1] if shape else ()
    hooks = b"ccollections\nOrderedDict\n)R"
    held = _FIRST if storage is None else storage
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + plain((held, offset, shape, strides, False, hooks)) + b"R"


_FIRST = storage()


def call(module: str, name: str, arguments: tuple[Any, ...]) -> bytes:
    """A pickle that calls something."""
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + plain(arguments) + b"R."


def write_torch(
    path: Path, content: bytes | Mapping[str, bytes], storages: Mapping[str, bytes], *, byteorder: bytes = b"little",
    method: int = zipfile.ZIP_STORED, extra: Mapping[str, bytes] | None = None,
) -> Path:
    """A file of `content` and the storages it refers to."""
    if not isinstance(content, bytes):
        content = b"\x80\x02}(" + b"".join(text(name) + value for name, value in content.items()) + b"u."
    entries = {
        "archive/data.pkl": content, "archive/byteorder": byteorder, **(extra or {}),
        **{f"archive/data/{key}": data for key, data in storages.items()}, "archive/version": b"3\n",
    }
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def from_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """Float32 arrays as torch would write them."""
    content = {
        name: tensor(shape=array.shape, storage=storage(key=str(index), count=array.size))
        for index, (name, array) in enumerate(arrays.items())
    }
    data = {str(index): array.astype(np.float32).tobytes() for index, array in enumerate(arrays.values())}
    return write_torch(path, content, data)


def opened(path: Path) -> bool:
    """Whether a file is read; nothing but WeightsError may come of one that is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for found in torch_bin.read_file(path).values():
                found.data.sum(dtype=np.float64)
        except WeightsError:
            return False
        return True
