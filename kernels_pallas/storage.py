"""How values are stored in pages, and how stored pages are read: the one place that knows of bit-cast storage.

On jax < 0.11 the CPU backend upcasts the whole operand of a 16-bit float scatter and copies it back (44 ms instead of
0.005 ms for a cache of 65,536 slots). Such pages are stored as uint16 there; a bit cast is free.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

_SIXTEEN_BIT_SCATTER_IS_IN_PLACE = jax.__version_info__ >= (0, 11)


def storage_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What pages of `dtype` must be allocated as."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize == 2 and not _SIXTEEN_BIT_SCATTER_IS_IN_PLACE:
        return jnp.dtype(jnp.uint16)
    return dtype


def to_storage(values: Array, stored: DTypeLike) -> Array:
    """`values` as they go into pages of dtype `stored`."""
    if jnp.dtype(stored) == jnp.uint16:
        return jax.lax.bitcast_convert_type(values, jnp.uint16)
    return values.astype(stored)


def from_storage(pages: Array, dtype: DTypeLike) -> Array:
    """Stored values as numbers; `dtype` is what uint16 bits stand for."""
    if pages.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(pages, dtype)
    return pages
