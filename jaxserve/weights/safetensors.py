"""The safetensors format: headers read and checked before anything is allocated, tensors as views of a memory map.

Knows files and bytes; no model, no parameter names, no jax. Reads a folder with one file or with an index over
several; writes single files (scripts and tests).
Invariant: a tensor that this module hands out lies inside its file, overlaps no other, and its bytes fit its shape.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.core.errors import WeightsError

HEADER_BYTES_MAX = 100_000_000      # the format's own limit
RANK_MAX = 8
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in a file; `data` is a read-only view of the memory map, so only what is looked at is read."""

    name: str
    file: str
    data: np.ndarray[Any, np.dtype[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, by name: through the index where there is one, else every *.safetensors."""
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_indexed(folder, index)
    single = folder / SINGLE_NAME
    # A folder may also hold the same model under other names ("consolidated.safetensors") or adapters.
    files = [single] if single.is_file() else sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise WeightsError(f"no *.safetensors file in {folder}; weights are read from safetensors only")
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in read_file(path).items():
            if name in tensors:
                raise WeightsError(
                    f"tensor {name!r} is in both {tensors[name].file} and {tensor.file}, and there is no {INDEX_NAME} "
                    "that says which one counts; remove the files that do not belong to the model"
                )
            tensors[name] = tensor
    return tensors


def _read_indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """Exactly the tensors that the index lists, from the files that it names."""
    try:
        place = json.loads(index.read_bytes(), object_pairs_hook=_without_duplicates)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index.name} is not a safetensors index: {error}") from error
    if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
        raise WeightsError(f"{index.name}: 'weight_map' must map tensor names to file names")
    files: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(place.values())):
        # Only plain names: the index must not reach outside the folder it came with.
        if file != Path(file).name or file in ("", ".", ".."):
            raise WeightsError(f"{index.name} points outside its folder: {file!r}")
        if not (folder / file).is_file():
            raise WeightsError(f"{index.name} names {file!r}, which is missing; the download is incomplete")
        files[file] = read_file(folder / file)
    for file, found in files.items():
        for name in found:
            if place.get(name) != file:
                raise WeightsError(f"tensor {name!r} of {file} is {_elsewhere(place.get(name))} {index.name}")
    for name, file in place.items():
        if name not in files[file]:
            raise WeightsError(f"{index.name} says that tensor {name!r} is in {file!r}; it is not")
    return {name: files[file][name] for name, file in place.items()}


def _elsewhere(file: str | None) -> str:
    return "not listed in" if file is None else f"placed in {file!r} by"


def read_file(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file. Nothing is read but the header; every check happens before a view is made."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size, path.name)
        if not header:
            return {}
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _checked_entry(entry, size - start, f"{path.name}: tensor {name!r}")
        spans.append((begin, end, name))
        data: np.ndarray[Any, np.dtype[Any]] = np.ndarray(shape, dtype, buffer=buffer, offset=start + begin) \
            if end > begin else np.empty(shape, dtype)
        tensors[name] = StoredTensor(name=name, file=path.name, data=data)
    spans.sort()
    for (_, end, before), (begin, _, after) in itertools.pairwise(spans):
        if begin < end:
            raise WeightsError(f"{path.name}: tensors {before!r} and {after!r} overlap")
    return tensors


def _read_header(file: Any, size: int, where: str) -> tuple[dict[str, Any], int]:
    """The header without its metadata, and where the data begins."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise WeightsError(f"{where}: {size} bytes are too few for a safetensors file; the download is incomplete")
    (length,) = struct.unpack("<Q", prefix)
    if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
        raise WeightsError(
            f"{where}: a header of {length} bytes cannot be (the file has {size}, the format allows "
            f"{HEADER_BYTES_MAX}); it is not a safetensors file, or a git-lfs pointer, or cut off"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{where}: the header must be a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _checked_entry(entry: Any, data_bytes: int, where: str) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry; sizes are Python integers, so nothing overflows."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{where}: an entry needs dtype, shape and two data_offsets") from error
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise WeightsError(f"{where}: unknown dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > RANK_MAX or not all(_is_size(n) for n in shape):
        raise WeightsError(f"{where}: {shape!r} is not a shape")
    if not (_is_size(begin) and _is_size(end) and begin <= end <= data_bytes):
        raise WeightsError(
            f"{where}: bytes {begin}…{end} lie outside the file, which has {data_bytes} of data; it may be cut off"
        )
    need = dtype.itemsize
    for n in shape:
        need *= n
    if need != end - begin:
        raise WeightsError(f"{where}: {dtype_name}{shape} takes {need} bytes, its data_offsets hold {end - begin}")
    return dtype, tuple(shape), begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return found


def write_file(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes one file, tensors in the given order, the data aligned to 64 bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, data in tensors.items():
        header[name] = {
            "dtype": names[data.dtype], "shape": list(data.shape), "data_offsets": [offset, offset + data.nbytes]
        }
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in tensors.values():
            file.write(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data)
