"""From checkpoint files to placed parameters: each device gets the slice it owns, assembled on the host, then placed.

Knows no format and no family. Host memory holds the slices that are on their way, never a second model: files are
memory maps, and on the CPU a slice's memory *becomes* the device array (it is aligned as XLA wants it).
Invariant: values are finite, or WeightsError names the tensor that is not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxserve.core.errors import WeightsError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.progress import Advance, NoProgress, ProgressPort
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import family
from jaxserve.quantization import int8, joined, online, packed
from jaxserve.quantization.codes import Codes
from jaxserve.quantization.formats.scheme import Scheme
from jaxserve.quantization.packing import Joined, Packing, is_packed
from jaxserve.sharding.split import Runs
from jaxserve.weights.files import StoredTensor
from jaxserve.weights.folder import LoadFormat, read_folder
from jaxserve.weights.packed import JoinedCodes, joined_codes, plan, stacked_codes, with_packed
from jaxserve.weights.rules import Assembly, match
from jaxserve.weights.shards import HostArray, Index, layouts, read_shard

ALIGNMENT = 64          # XLA on the CPU adopts host memory that is aligned so, and copies other memory
HUGE_BYTES_MIN = 4 << 20
THREADS_MAX = 8
CHUNK_BYTES = 1 << 20   # copied, then checked while still in the cache

Source = TypeVar("Source")


def open_checkpoint(
    spec: ModelSpec, folder: Path, load_format: LoadFormat = "auto", scheme: Scheme | None = None
) -> list[Assembly]:
    """Where each parameter of the model comes from; reads names and shapes only."""
    stored = with_packed(read_folder(folder, load_format), scheme)
    return match(abstract_params(spec, np.float32), family(spec.family).weights(spec), stored)


def load_params(
    spec: ModelSpec, folder: Path, mesh: Mesh, dtype: DTypeLike, progress: ProgressPort | None = None,
    load_format: LoadFormat = "auto", packing: Packing | None = None, scheme: Scheme | None = None,
) -> dict[str, Any]:
    """The parameters of a checkpoint folder on the mesh, in `dtype` but for those that `packing` names.

    Args:
      scheme: the format of a quantised checkpoint; without a packing, whatever can stay packed does.
    """
    assemblies = open_checkpoint(spec, folder, load_format, scheme)
    if packing is None:
        packing = plan(spec, mesh, assemblies)
    abstract = abstract_params(spec, dtype, mesh, packing)
    # What is packed is packed from float32, not from values rounded to `dtype` first.
    assemblies = [
        replace(assembly, abstract=jax.ShapeDtypeStruct(
            assembly.abstract.shape, np.float32 if assembly.path in packing else np.dtype(dtype)
        )) for assembly in assemblies
    ]
    total = sum(assembly.abstract.size * assembly.abstract.dtype.itemsize for assembly in assemblies)
    with (progress or NoProgress()).task("loading weights", total, "B") as advance:
        def codes(assembly: Assembly) -> Codes | JoinedCodes | None:
            how = packing.get(assembly.path)
            found = joined_codes(assembly, how.parts) if isinstance(how, Joined) else stacked_codes(assembly)
            if found is not None:
                advance(assembly.abstract.size * assembly.abstract.dtype.itemsize)
            return found

        return place(
            abstract, layouts(spec, mesh), assemblies, lambda assembly, index: read_slice(assembly, index, advance),
            codes,
        )


def place(
    abstract: Any, layouts_: Iterable[tuple[Runs, ...]], sources: Iterable[Source],
    read: Callable[[Source, Index], HostArray], codes: Callable[[Source], Codes | JoinedCodes | None] = lambda _: None,
) -> dict[str, Any]:
    """A tree like `abstract` whose leaves are made of `read(source, index)`, one source a leaf, several at a time.

    `read` gives slices of the whole parameter, which a layout makes a device's slice of. A packed leaf is made of the
    codes of its source; where it has none, of its plain matrix.
    """
    leaves, tree = jax.tree.flatten(abstract, is_leaf=is_packed)

    def make(leaf: Any, layout: tuple[Runs, ...], source: Source) -> Any:
        def shard(index: Index) -> HostArray:
            return read_shard(layout, index, lambda whole: read(source, whole), aligned_empty)

        if not is_packed(leaf):
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)
            return array.block_until_ready()       # frees the host slice before the next one is assembled
        found = codes(source)
        if isinstance(leaf, joined.JoinedTensor):
            assert isinstance(found, JoinedCodes)
            return joined.make(leaf, found.parts, found.codes, layout[-1], _cut, aligned_empty)     # type: ignore[arg-type]
        if isinstance(leaf, int8.Int8Tensor):
            if found is None:
                return int8.make(leaf, lambda rows: shard((rows, slice(None))), aligned_empty)
            return int8.adopt(leaf, found, layout, _cut)     # type: ignore[arg-type]
        if found is None:
            whole = read(source, (slice(None),) * len(layout))
            found = online.float_codes(whole.astype(np.float32))
        return packed.make(leaf, found, layout, _cut, aligned_empty)     # type: ignore[arg-type]

    with ThreadPoolExecutor(min(THREADS_MAX, os.cpu_count() or 1), thread_name_prefix="weights") as pool:
        futures = [pool.submit(make, *of_leaf) for of_leaf in zip(leaves, layouts_, sources, strict=True)]
        try:
            return jax.tree.unflatten(tree, [future.result() for future in futures])
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _cut(whole: HostArray, layout: tuple[Runs, ...]) -> Callable[[Index], HostArray]:
    """Devices' slices of an array in memory."""
    return lambda index: read_shard(layout, index, lambda at: whole[at], aligned_empty)


def read_slice(assembly: Assembly, index: Index, advance: Advance) -> HostArray:
    """One device's slice of a parameter, gathered from the blocks that it meets.

    Rows of the parameter:   [0 ······ q ······)[ k )[ v )
    The slice:                         [start ······· stop)
    """
    wanted = [range(*part.indices(size)) for part, size in zip(index, assembly.abstract.shape, strict=True)]
    out = aligned_empty(tuple(len(axis) for axis in wanted), assembly.abstract.dtype)
    for block in assembly.blocks:
        box = [range(at, at + size) for at, size in zip(block.at, block.shape, strict=True)]
        both = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(wanted, box, strict=True)]
        if all(both):
            _copy(block.read()[_within(both, box)], out[_within(both, wanted)], block.tensor, advance)
    return out


def _within(both: list[range], outer: list[range]) -> Index:
    """Indices of a box, counted from where `outer` begins."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(both, outer, strict=True))


def _copy(source: HostArray, out: HostArray, tensor: StoredTensor, advance: Advance) -> None:
    """Copies, converts and checks, a chunk of rows at a time; boxes of one expert or head are their rows."""
    while out.ndim > 1 and len(out) == 1:
        source, out = source[0], out[0]
    step = max(1, CHUNK_BYTES * len(out) // max(1, out.nbytes))
    with np.errstate(over="ignore", invalid="ignore"):
        for row in range(0, len(out), step):
            chunk = out[row : row + step]
            chunk[...] = source[row : row + step]
            if not is_finite(chunk):
                stored = tensor.data.dtype.name
                why = "" if stored == out.dtype.name else f" in {out.dtype.name} (it is stored as {stored})"
                raise WeightsError(f"tensor {tensor.name!r} of {tensor.file} holds infinities or NaN{why}")
            advance(chunk.nbytes)


def is_finite(values: HostArray) -> bool:
    """No exponent is all ones. Integer arithmetic: several times faster than isfinite, above all for bfloat16."""
    bits, exponent = {
        "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000),
    }[values.dtype.name]
    if not values.size:
        return True
    return bool((values.view(bits) & bits(exponent)).max() < exponent)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Memory that XLA's CPU client can adopt; its content is arbitrary."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if nbytes >= HUGE_BYTES_MIN and hasattr(mmap, "MADV_HUGEPAGE"):
        # Faulting memory in by 4 KiB pages takes longer than copying the weights: 0.7 against 6 GB/s measured.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):      # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
