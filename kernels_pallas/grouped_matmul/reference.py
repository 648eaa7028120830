"""The specification of the grouped product: every row with every weight, all but its own dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized_matmul.weights import PackedWeight, dequantised


def grouped_matmul(x_TI: Array, weight_EOI: Array | PackedWeight, count_E: Array) -> Array:
    """See `api.grouped_matmul`."""
    if isinstance(weight_EOI, PackedWeight):
        weight_EOI = dequantised(weight_EOI, x_TI.dtype)
    end_E = jnp.cumsum(count_E)
    row_T = jnp.arange(x_TI.shape[0], dtype=jnp.int32)
    is_in_TE = (row_T[:, None] < end_E) & (row_T[:, None] >= end_E - count_E)
    with jax.default_matmul_precision("highest"):
        every_TEO = jnp.einsum("TI,EOI->TEO", x_TI, weight_EOI, preferred_element_type=jnp.float32)
    return jnp.where(is_in_TE[:, :, None], every_TEO, 0).sum(1)
