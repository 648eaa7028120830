"""The GGUF format: facts and tensors of a file, tensors as views of its memory map; quantised ones as arrays of blocks.

Source: the format's specification in ggml (docs/gguf.md), versions 2 and 3, little-endian. A matrix [O, I] is stored
with its sizes in reverse; what is packed comes out as blocks [O, I / elements of a block] of a structured dtype, which
`quantization.formats.gguf` reads.
Knows no model. Invariant: a tensor that this module hands out lies inside its file, aligned, and overlaps no other.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.quantization.formats.gguf import KINDS
from jaxserve.weights.files import RANK_MAX, StoredTensor, empty, foreign, map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32          # of tensors, unless the file says another
DEPTH_MAX = 4           # of arrays in arrays
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
# By ggml's number of the type.
PLAIN: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32), 1: np.dtype(np.float16), 28: np.dtype(np.float64), 30: np.dtype(ml_dtypes.bfloat16),
}


class _Cursor:
    """A place in the file that moves on as it is read. Mutable."""

    def __init__(self, buffer: mmap.mmap, where: str) -> None:
        self._buffer, self._where, self.at = buffer, where, 0

    def take(self, count: int) -> bytes:
        if count > len(self._buffer) - self.at:
            raise WeightsError(f"{self._where}: byte {self.at} promises {count} more; the file is cut off or damaged")
        self.at += count
        return self._buffer[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self._where}: text before byte {self.at} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """One fact; arrays of numbers are numpy's."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == DEPTH_MAX:
            raise WeightsError(f"{self._where}: byte {self.at}: a fact of type {kind} is not known")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            dtype = np.dtype(f"<{NUMBERS[inner]}")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return [self.value(inner, depth + 1) for _ in self.counted(count)]

    def counted(self, count: int) -> range:
        """Each of `count` things takes a byte at least, so no number of the file makes a loop without end."""
        if count > len(self._buffer) - self.at:
            raise WeightsError(f"{self._where}: byte {self.at} promises {count} more; the file is cut off or damaged")
        return range(count)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Facts by name, and tensors by name."""
    buffer, where = map_file(path), path.name
    cursor = _Cursor(buffer, where)
    if (magic := cursor.take(4)) != MAGIC:
        raise WeightsError(f"{where} is {foreign(buffer[:64]) or f'no GGUF file: it begins with {magic!r}'}")
    if (version := cursor.number("I")) not in VERSIONS:
        raise WeightsError(f"{where}: version {version} of GGUF is not read; supported are 2 and 3, little-endian")
    tensor_count, fact_count = cursor.number("Q"), cursor.number("Q")
    facts = {}
    for _ in cursor.counted(fact_count):
        name = cursor.text()
        facts[name] = cursor.value(cursor.number("I"))
    alignment = facts.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise WeightsError(f"{where}: general.alignment is {alignment!r}; expected a size")
    entries = [_entry(cursor, where) for _ in cursor.counted(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return facts, _tensors(buffer, where, entries, start, alignment)


def _entry(cursor: _Cursor, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, rank = cursor.text(), cursor.number("I")
    if rank > RANK_MAX:
        raise WeightsError(f"{where}: tensor {name[:120]!r} has {rank} axes; at most {RANK_MAX} are read")
    sizes = [cursor.number("Q") for _ in range(rank)]
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _tensors(
    buffer: mmap.mmap, where: str, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, StoredTensor]:
    """Views of the data, each checked to be one."""
    tensors: dict[str, StoredTensor] = {}
    spans = []
    for name, sizes, kind, offset in entries:
        said = f"{where}: tensor {name[:120]!r}"
        dtype, shape = _stored_as(sizes, kind, said)
        size = dtype.itemsize * math.prod(shape)
        if name in tensors:
            raise WeightsError(f"{said} is there twice")
        if offset % alignment or size > len(buffer) - start - offset:
            raise WeightsError(f"{said}: {size} bytes at {offset} do not lie in the file, or not at its {alignment}s")
        if size:
            spans.append((offset, offset + size, name))
        data = np.ndarray(shape, dtype, buffer=buffer, offset=start + offset) if size else empty(shape, dtype, said)
        tensors[name] = StoredTensor(name=name, file=where, data=data)
    spans.sort()
    for (_, end, before), (begin, _, after) in itertools.pairwise(spans):
        if begin < end:
            raise WeightsError(f"{where}: tensors {before!r} and {after!r} overlap")
    return tensors


def _stored_as(sizes: tuple[int, ...], kind: int, said: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """dtype and shape of the array that lies in the file."""
    if kind in PLAIN:
        return PLAIN[kind], sizes
    if kind not in KINDS:
        known = ", ".join([*(dtype.name for dtype in PLAIN.values()), *(block.name for block in KINDS.values())])
        raise WeightsError(f"{said} is of ggml's type {kind}, which is not read; supported are {known}")
    block = KINDS[kind]
    if not sizes or sizes[-1] % block.size:
        raise WeightsError(f"{said} is {list(sizes)}; rows of {block.name} are multiples of {block.size}")
    return block.dtype, (*sizes[:-1], sizes[-1] // block.size)
