"""Random parameters for `--load-format dummy`: a config alone serves, for benchmarks and CI.

Seconds for billions of parameters: every tensor is copied from one pool of normal numbers, from a place of its own.
Invariant: equal seeds, specs and dtypes give equal values, whatever the mesh.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.decoder import abstract_params
from jaxserve.quantization.packing import Packing, path_of
from jaxserve.weights.loader import aligned_empty, place
from jaxserve.weights.shards import HostArray, Index, layouts

POOL_SIZE = 4_194_301    # a prime: rows of no usual width repeat in step with it
DEVIATION = 0.02         # what models are initialised with


def random_params(
    spec: ModelSpec, mesh: Mesh, dtype: DTypeLike, seed: int = 0, packing: Packing | None = None
) -> dict[str, Any]:
    """A tree like a loaded one: norms are one, biases zero, the rest normal."""
    abstract = abstract_params(spec, dtype, mesh, packing)
    pool = (np.random.default_rng(seed).standard_normal(POOL_SIZE, np.float32) * DEVIATION).astype(dtype)
    plain = jax.tree_util.tree_leaves_with_path(abstract_params(spec, dtype))
    leaves = [(path_of(path), leaf) for path, leaf in plain]
    return place(abstract, layouts(spec, mesh), leaves, lambda named, index: _read(pool, *named, index))


def _read(pool: HostArray, path: str, leaf: jax.ShapeDtypeStruct, index: Index) -> HostArray:
    """One device's slice of a parameter. Its element (r, c) is pool[offset + r · columns + c], around the end."""
    rows, *columns = (range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True))
    out = aligned_empty((len(rows), *(len(column) for column in columns)), leaf.dtype)
    if leaf.ndim == 1:
        out[...] = 1 if path.endswith("norm/weight") else 0
        return out
    if leaf.ndim > 2:
        return _read_stack(pool, path, leaf, index, out)
    width, (column,) = leaf.shape[1], columns
    start = zlib.crc32(path.encode()) + rows.start * width
    if len(column) == width:
        _fill(pool, out.reshape(-1), start)
    else:
        for row, values in enumerate(out):
            _fill(pool, values, start + row * width + column.start)
    return out


def _read_stack(pool: HostArray, path: str, leaf: jax.ShapeDtypeStruct, index: Index, out: HostArray) -> HostArray:
    """A slice of a stack: each member is a parameter of its own name."""
    member = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    for place_, number in enumerate(range(*index[0].indices(leaf.shape[0]))):
        out[place_] = _read(pool, f"{path}/{number}", member, index[1:])
    return out


def _fill(pool: HostArray, out: HostArray, start: int) -> None:
    done, place_ = 0, start % len(pool)
    while done < len(out):
        count = min(len(out) - done, len(pool) - place_)
        out[done : done + count] = pool[place_ : place_ + count]
        done, place_ = done + count, 0
