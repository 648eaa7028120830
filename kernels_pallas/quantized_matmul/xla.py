"""The packed product in plain XLA, for anything: the matrix is unpacked to the rows' type, then multiplied.

Traffic: the packed matrix once, the unpacked one written and read: slower than an unquantised product, and one
matrix of temporary memory. It is the fallback; nothing that XLA offers multiplies codes and groups in one loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized_matmul.weights import PackedWeight, dequantised


def quantized_matmul(x_TI: Array, weight: PackedWeight) -> Array:
    """See `api.quantized_matmul`."""
    precision = jax.lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else None
    with jax.named_scope("quantized_matmul"):
        weight_OI = dequantised(weight, x_TI.dtype)
        return jnp.einsum("TI,OI->TO", x_TI, weight_OI, precision=precision, preferred_element_type=jnp.float32)
