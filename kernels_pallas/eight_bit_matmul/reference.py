"""The specification of products of 8 bits, in plain jnp: exact integers, or exact products of floats in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def eight_bit_matmul(x_TI: Array, weight_OI: Array, scale_TG: Array | None, scale_OG: Array | None) -> Array:
    """See `api.eight_bit_matmul`."""
    if x_TI.dtype == jnp.int8:
        return jnp.einsum("TI,OI->TO", x_TI, weight_OI, preferred_element_type=jnp.int32)
    x_TI, weight_OI = x_TI.astype(jnp.float32), weight_OI.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        if scale_OG is None or scale_TG is None:
            return jnp.einsum("TI,OI->TO", x_TI, weight_OI)
        groups = scale_OG.shape[1]
        x_TGI, weight_OGI = (of.reshape(len(of), groups, -1) for of in (x_TI, weight_OI))
        return jnp.einsum("TGI,OGI,TG,OG->TO", x_TGI, weight_OGI, scale_TG, scale_OG)
