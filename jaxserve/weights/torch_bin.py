"""PyTorch's zip format (pytorch_model.bin), read without torch: tensors as views of a memory map.

Source: the layout that torch.save writes since 1.6: a zip of stored entries, NAME/data.pkl a pickle that refers to
storages NAME/data/KEY by persistent ids. The pickle is not unpickled: `torch_pickle` interprets the few opcodes that
build a dict of tensors.
Knows no model. Invariant: a tensor lies inside its storage, which lies inside the file; nothing is imported or run.
"""

from __future__ import annotations

import itertools
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.weights.files import RANK_MAX, StoredTensor, empty, foreign, is_size, map_file
from jaxserve.weights.torch_pickle import PickleError, Storage, TensorView, interpret

PICKLE_BYTES_MAX = 16 << 20     # names and shapes alone: 80,000 tensors; and what a hostile one makes of them
LOCAL_HEADER = struct.Struct("<4s5H3I2H")

# Scalar types of torch and their older storage classes.
DTYPES: dict[str, np.dtype[Any]] = {
    "torch.float64": np.dtype(np.float64), "torch.DoubleStorage": np.dtype(np.float64),
    "torch.float32": np.dtype(np.float32), "torch.FloatStorage": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16), "torch.HalfStorage": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16), "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.int64": np.dtype(np.int64), "torch.LongStorage": np.dtype(np.int64),
    "torch.int32": np.dtype(np.int32), "torch.IntStorage": np.dtype(np.int32),
    "torch.int16": np.dtype(np.int16), "torch.ShortStorage": np.dtype(np.int16),
    "torch.int8": np.dtype(np.int8), "torch.CharStorage": np.dtype(np.int8),
    "torch.uint8": np.dtype(np.uint8), "torch.ByteStorage": np.dtype(np.uint8),
    "torch.uint16": np.dtype(np.uint16), "torch.uint32": np.dtype(np.uint32), "torch.uint64": np.dtype(np.uint64),
    "torch.bool": np.dtype(np.bool_), "torch.BoolStorage": np.dtype(np.bool_),
    "torch.UntypedStorage": np.dtype(np.uint8), "torch.storage.UntypedStorage": np.dtype(np.uint8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Bytes of one zip entry."""

    begin: int
    end: int


def read_file(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file. Nothing is read but the zip's directory and the pickle."""
    buffer, where = map_file(path), path.name
    entries = _entries(where, buffer)
    prefix = _prefix(entries, where)
    order = entries.get(prefix + "byteorder")
    if order is not None and (said := buffer[order.begin : min(order.end, order.begin + 16)]) != b"little":
        raise WeightsError(f"{where}: byte order {said!r} is not read, only b'little'; convert it to safetensors")
    span = entries[prefix + "data.pkl"]
    if span.end - span.begin > PICKLE_BYTES_MAX:
        raise WeightsError(f"{where}: a pickle of {span.end - span.begin} bytes; at most {PICKLE_BYTES_MAX} are read")
    try:
        found = interpret(buffer[span.begin : span.end], frozenset(DTYPES))
    except PickleError as error:
        raise WeightsError(f"{where}: {error}") from error
    storages = {name.removeprefix(prefix + "data/"): span for name, span in entries.items()}
    return {
        name: StoredTensor(name=name, file=where, data=_view(tensor, buffer, storages, f"{where}: tensor {name!r}"))
        for name, tensor in found.items()
    }


def _entries(where: str, buffer: mmap.mmap) -> dict[str, _Span]:
    """Where each entry's bytes are: stored as they are, inside the file, none over another."""
    if buffer[:4] != b"PK\x03\x04":
        raise WeightsError(f"{where} is {_otherwise(buffer[:64])}")
    try:
        with zipfile.ZipFile(cast(BinaryIO, buffer)) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise WeightsError(f"{where} is not a whole zip file ({error}); the download is incomplete") from error
    entries: dict[str, _Span] = {}
    for info in listed:
        name, stored = info.filename, info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & 1:
            raise WeightsError(f"{where}: {name!r} is compressed or encrypted; torch stores entries as they are")
        if name in entries:
            raise WeightsError(f"{where}: {name!r} is in the zip twice")
        begin, end = info.header_offset, info.header_offset + LOCAL_HEADER.size
        if not 0 <= begin <= end <= len(buffer):
            raise WeightsError(f"{where}: {name!r} begins at {begin}, outside the file's {len(buffer)} bytes")
        magic, *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack(buffer[begin:end])
        begin = end + name_bytes + extra_bytes
        if magic != b"PK\x03\x04" or begin + info.file_size > len(buffer):
            raise WeightsError(
                f"{where}: {name!r} takes bytes {begin}…{begin + info.file_size}, the file has {len(buffer)}; "
                "it is cut off or its directory is wrong"
            )
        entries[name] = _Span(begin=begin, end=begin + info.file_size)
    spans = sorted((span.begin, span.end, name) for name, span in entries.items() if span.end > span.begin)
    for (_, end, before), (begin, _, after) in itertools.pairwise(spans):
        if begin < end:
            raise WeightsError(f"{where}: {before!r} and {after!r} overlap")
    return entries


def _otherwise(head: bytes) -> str:
    if head[:1] == b"\x80":
        return (
            "in the format of PyTorch before 1.6, a bare pickle, which is not read; convert it to safetensors where "
            "torch is: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    return foreign(head) or "no PyTorch file (a zip that torch.save wrote)"


def _prefix(entries: Mapping[str, _Span], where: str) -> str:
    """The folder in the zip that everything is in."""
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{where}: {len(pickles)} entries NAME/data.pkl in the zip; torch.save writes one")
    prefix = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(prefix + "code/") for name in entries):
        raise WeightsError(f"{where} is a TorchScript program, not weights; its code is not run")
    return prefix


def _view(tensor: TensorView, buffer: mmap.mmap, storages: Mapping[str, _Span], where: str) -> np.ndarray[Any, Any]:
    """The array that a tensor's strides select from its storage; sizes are Python integers, nothing overflows."""
    storage = tensor.storage
    span = storages.get(storage.key)
    if span is None:
        raise WeightsError(f"{where}: its storage {storage.key!r} is not in the file")
    dtype, nbytes = DTYPES[tensor.dtype or storage.dtype], _nbytes(storage)
    if nbytes != span.end - span.begin:
        raise WeightsError(
            f"{where}: its storage {storage.key!r} should be {nbytes} bytes and is {span.end - span.begin}"
        )
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > RANK_MAX:
        raise WeightsError(f"{where}: {len(tensor.shape)} sizes and {len(tensor.strides)} strides; as many, at most 8")
    if not all(map(is_size, (*tensor.shape, *tensor.strides, tensor.offset))):
        raise WeightsError(f"{where}: sizes, strides and offset must be integers from 0")
    count, last = 1, tensor.offset
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        count *= size
        last += (size - 1) * stride
    room = nbytes // dtype.itemsize
    if not count:
        return empty(tensor.shape, dtype, where)
    if last >= room:
        raise WeightsError(f"{where}: it reaches to element {last} of a storage of {room}")
    if count > room:
        raise WeightsError(f"{where}: {count} elements out of a storage of {room}; repeated values are not read")
    return np.ndarray(
        tensor.shape, dtype, buffer=buffer, offset=span.begin + tensor.offset * dtype.itemsize,
        strides=[stride * dtype.itemsize for stride in tensor.strides],
    )


def _nbytes(storage: Storage) -> int:
    return storage.count * DTYPES[storage.dtype].itemsize
