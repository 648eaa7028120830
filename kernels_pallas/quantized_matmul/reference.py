"""The specification of the packed product: the weights in the rows' type, then an exact product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized_matmul.weights import PackedWeight, dequantised


def quantized_matmul(x_TI: Array, weight: PackedWeight) -> Array:
    """See `api.quantized_matmul`."""
    with jax.default_matmul_precision("highest"):
        return jnp.einsum(
            "TI,OI->TO", x_TI.astype(jnp.float32), dequantised(weight, x_TI.dtype).astype(jnp.float32)
        )
