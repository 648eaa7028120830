"""Products of 8 bits in plain XLA, for anything: integers as they are, floats widened to bfloat16, which holds them.

Traffic: floats are read, written and read again; sums of groups are scaled one group after the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def eight_bit_matmul(x_TI: Array, weight_OI: Array, scale_TG: Array | None, scale_OG: Array | None) -> Array:
    """See `api.eight_bit_matmul`."""
    with jax.named_scope("eight_bit_matmul"):
        if x_TI.dtype == jnp.int8:
            return jnp.einsum("TI,OI->TO", x_TI, weight_OI, preferred_element_type=jnp.int32)
        if scale_TG is None or scale_OG is None:
            return _product(x_TI, weight_OI)
        groups = scale_OG.shape[1]
        size = x_TI.shape[1] // groups

        def add(group: Array, sum_TO: Array) -> Array:
            x_TI_, weight_OI_ = (lax.dynamic_slice_in_dim(of, group * size, size, 1) for of in (x_TI, weight_OI))
            scale_T, scale_O = scale_TG[:, group], scale_OG[:, group]
            return sum_TO + _product(x_TI_, weight_OI_) * scale_T[:, None] * scale_O

        return lax.fori_loop(0, groups, add, jnp.zeros((len(x_TI), len(weight_OI)), jnp.float32))


def _product(x_TI: Array, weight_OI: Array) -> Array:
    x_TI, weight_OI = x_TI.astype(jnp.bfloat16), weight_OI.astype(jnp.bfloat16)
    return jnp.einsum("TI,OI->TO", x_TI, weight_OI, preferred_element_type=jnp.float32)
