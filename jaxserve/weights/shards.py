"""A device's slice of a parameter, put together from where its rows lie in the whole one. Knows indices, no file.

On one device every slice is read as it is; on several, fused and padded axes are gathered run by run.
Invariant: what no run names is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.decoder import abstract_params, logical_axes
from jaxserve.sharding.split import Run, Runs, runs

Index = tuple[slice, ...]
HostArray = np.ndarray[Any, np.dtype[Any]]


def layouts(spec: ModelSpec, mesh: Mesh) -> list[tuple[Runs, ...]]:
    """For each parameter, in the order of the tree's leaves, the runs along each of its axes."""
    found = []
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(spec, np.float32))
    for (path, leaf), axes in zip(leaves, logical_axes(spec), strict=True):
        name = path[0].key
        layer = spec.layers[int(name.removeprefix("layers_"))] if name.startswith("layers_") else None
        found.append(tuple(runs(axis, size, layer, mesh) for axis, size in zip(axes, leaf.shape, strict=True)))
    return found


def read_shard(
    layout: tuple[Runs, ...], index: Index, read: Callable[[Index], HostArray],
    empty: Callable[[tuple[int, ...], Any], HostArray],
) -> HostArray:
    """The slice at `index` of the joined parameter.

    Args:
      read: a slice of the whole parameter.  empty: memory that a device adopts.
    """
    cut = [_within(of_axis, part) for of_axis, part in zip(layout, index, strict=True)]
    if all(len(of_axis) == 1 and of_axis[0].start is not None for of_axis in cut):
        return read(tuple(_slice(of_axis[0]) for of_axis in cut))
    out: HostArray | None = None
    shape = tuple(sum(run.count for run in of_axis) for of_axis in cut)
    for box in itertools.product(*map(_placed, cut)):
        if all(run.start is not None for _, run in box):
            values = read(tuple(_slice(run) for _, run in box))
            if out is None:
                out = empty(shape, values.dtype)
                out[...] = 0
            out[tuple(slice(at, at + run.count) for at, run in box)] = values
    if out is None:     # nothing but padding: an empty slice tells the type
        dtype = read(tuple(slice(0, 0) for _ in cut)).dtype
        out = empty(shape, dtype)
        out[...] = 0
    return out


def _within(of_axis: Runs, part: slice) -> list[Run]:
    """The runs that a slice of the joined axis meets, cut to it."""
    size = sum(run.count for run in of_axis)
    start, stop, _ = part.indices(size)
    found, begin = [], 0
    for run in of_axis:
        first, last = max(begin, start), min(begin + run.count, stop)
        if first < last:
            found.append(Run(None if run.start is None else run.start + first - begin, last - first))
        begin += run.count
    return found


def _placed(of_axis: list[Run]) -> list[tuple[int, Run]]:
    """Each run with where it begins in the slice."""
    ends = itertools.accumulate((run.count for run in of_axis), initial=0)
    return list(zip(ends, of_axis, strict=False))


def _slice(run: Run) -> slice:
    assert run.start is not None
    return slice(run.start, run.start + run.count)
