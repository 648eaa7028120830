"""The safetensors format: headers read and checked before anything is allocated, tensors as views of a memory map.

Knows files and bytes; no model, no parameter names, no jax. Writes single files too (scripts and tests).
Invariant: a tensor that this module hands out lies inside its file, overlaps no other, and its bytes fit its shape.
"""

from __future__ import annotations

import itertools
import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.weights.files import (
    RANK_MAX,
    StoredTensor,
    empty,
    foreign,
    is_size,
    map_file,
    without_duplicates,
)

HEADER_BYTES_MAX = 100_000_000      # the format's own limit

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


def read_file(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file. Nothing is read but the header; every check happens before a view is made."""
    buffer = map_file(path)
    header, start = _read_header(buffer, path.name)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"{path.name}: tensor {name!r}"
        dtype, shape, begin, end = _checked_entry(entry, len(buffer) - start, where)
        if end > begin:
            spans.append((begin, end, name))
            data: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=buffer, offset=start + begin)
        else:
            data = empty(shape, dtype, where)
        tensors[name] = StoredTensor(name=name, file=path.name, data=data)
    spans.sort()
    for (_, end, before), (begin, _, after) in itertools.pairwise(spans):
        if begin < end:
            raise WeightsError(f"{path.name}: tensors {before!r} and {after!r} overlap")
    return tensors


def _read_header(buffer: mmap.mmap, where: str) -> tuple[dict[str, Any], int]:
    """The header without its metadata, and where the data begins."""
    size = len(buffer)
    if said := foreign(buffer[:64]):
        raise WeightsError(f"{where} is {said}")
    if size < 8:
        raise WeightsError(f"{where}: {size} bytes are too few for a safetensors file; the download is incomplete")
    (length,) = struct.unpack("<Q", buffer[:8])
    if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
        raise WeightsError(
            f"{where}: a header of {length} bytes cannot be (the file has {size}, the format allows "
            f"{HEADER_BYTES_MAX}); it is not a safetensors file, or it is cut off"
        )
    try:
        header = json.loads(buffer[8 : 8 + length], object_pairs_hook=without_duplicates)
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
    if not isinstance(shape, list) or len(shape) > RANK_MAX or not all(is_size(n) for n in shape):
        raise WeightsError(f"{where}: {str(shape)[:80]} is not a shape")
    if not (is_size(begin) and is_size(end) and begin <= end <= data_bytes):
        raise WeightsError(
            f"{where}: bytes {begin}…{end} lie outside the file, which has {data_bytes} of data; it may be cut off"
        )
    need = dtype.itemsize
    for n in shape:
        need *= n
    if need != end - begin:
        raise WeightsError(f"{where}: {dtype_name}{shape} takes {need} bytes, its data_offsets hold {end - begin}")
    return dtype, tuple(shape), begin, end


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
