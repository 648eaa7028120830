"""What devices tell each other: the only file that communicates. Layers call it and do not know how many they are.

A program for several devices is traced once, under `shard_map`, as what one device does; here is what only makes
sense there. Outside of it (one device) every function gives back what it was given.
Invariant: axes are logical names of `rules`; whether anything is sent depends on the mesh alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.sharding.rules import LOGICAL_AXES


def part_count(axis: str | None) -> int:
    """How many devices share a logical axis here."""
    names = _mesh_axes(axis)
    return jax.lax.axis_size(names) if names else 1


def part(axis: str | None) -> Array | int:
    """Which part of a logical axis this device has."""
    names = _mesh_axes(axis)
    return jax.lax.axis_index(names) if names else 0


def total(x: Array, axis: str | None, dtype: DTypeLike) -> Array:
    """The sum over devices where `axis`, which was summed over, is cut; sent as `dtype`."""
    names = _mesh_axes(axis)
    return jax.lax.psum(x.astype(dtype), names) if names else x


def largest(x: Array, axis: str | None) -> Array:
    """The largest over devices where `axis` is cut, element by element."""
    names = _mesh_axes(axis)
    return jax.lax.pmax(x, names) if names else x


def rows_of_columns(x_BV: Array, axis: str, rows_axis: str) -> Array:
    """From all rows of this device's columns to all columns of its rows; `axis` and `rows_axis` are cut alike."""
    names = _mesh_axes(axis)
    assert names == _mesh_axes(rows_axis), (axis, rows_axis)
    return jax.lax.all_to_all(x_BV, names, split_axis=0, concat_axis=1, tiled=True) if names else x_BV


def own_rows(x_B: Array, axis: str) -> Array:
    """This device's part of the first axis, which all devices have."""
    if (count := part_count(axis)) == 1:
        return x_B
    size = x_B.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x_B, part(axis) * size, size)


def all_rows(x_B: Array, axis: str) -> Array:
    """Every device's part of the first axis, one after the other, on each."""
    names = _mesh_axes(axis)
    return jax.lax.all_gather(x_B, names, tiled=True) if names else x_B


def padded_rows(x_B: Array, axis: str, fill: object = 0) -> Array:
    """With further rows of `fill`, until every device has equally many."""
    rest = -x_B.shape[0] % part_count(axis)
    return jnp.pad(x_B, ((0, rest), *((0, 0),) * (x_B.ndim - 1)), constant_values=fill) if rest else x_B


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    """Mesh axes that cut a logical axis; none outside of `shard_map`."""
    if axis is None:
        return ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in LOGICAL_AXES[axis] if name in mesh.manual_axes and mesh.shape[name] > 1)
