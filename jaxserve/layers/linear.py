"""Linear layers with weights as checkpoints store them, [out, in], contracted on the last axis of both operands.

Invariant: every product accumulates in float32. On the CPU this also selects XLA's fast bfloat16 path; a plain
bfloat16 product runs at 1.5 GB/s of weights.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding import collectives
from kernels_pallas.lanes import ROWS_MAX, lane_matmul
from kernels_pallas.native import api as native


def matmul(x_TI: Array, weight_OI: Array | QTensor, axis: str | None = None) -> Array:
    """x · weightᵀ in float32, of what this device has of the inputs; `axis` is their logical name."""
    if isinstance(weight_OI, QTensor):
        return weight_OI.matmul(x_TI, axis)
    if native.serves_dot(weight_OI.dtype, weight_OI.shape[0]) and x_TI.dtype == weight_OI.dtype:
        return jax.lax.platform_dependent(x_TI, weight_OI, cpu=native.matmul, default=_dot)
    if weight_OI.dtype.itemsize == 2 and x_TI.shape[0] <= ROWS_MAX:
        return jax.lax.platform_dependent(x_TI, weight_OI, cpu=lane_matmul, default=_dot)
    return _dot(x_TI, weight_OI)


def matmul_rounded(x_TI: Array, weight_OI: Array, axis: str, dtype: DTypeLike) -> Array:
    """x · weightᵀ of all devices, in `dtype` where nothing is left to be done in float32, else in float32."""
    is_whole = collectives.part_count(axis) == 1 and x_TI.dtype == weight_OI.dtype == dtype
    if is_whole and native.serves_dot(weight_OI.dtype, weight_OI.shape[0]):
        return jax.lax.platform_dependent(
            x_TI, weight_OI, cpu=partial(native.matmul, rounds=True), default=lambda x, w: _dot(x, w).astype(dtype)
        )
    return collectives.total(matmul(x_TI, weight_OI), axis, dtype)


def _dot(x_TI: Array, weight_OI: Array) -> Array:
    return jnp.einsum(
        "TI,OI->TO", x_TI, weight_OI, precision=precision_of(weight_OI.dtype), preferred_element_type=jnp.float32
    )


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Float32 operands are multiplied exactly, not in a GPU's 10-bit TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def matrix(
    module: nn.Module, shape: tuple[int, int], axes: tuple[str | None, str], dtype: DTypeLike
) -> Array | QTensor:
    """The module's parameter "weight": as it was loaded, which may be packed."""
    if module.is_initializing():
        return module.param("weight", nn.with_logical_partitioning(nn.initializers.normal(0.02), axes), shape, dtype)
    return module.get_variable("params", "weight")


class Linear(nn.Module):
    """x · weightᵀ + bias, added in float32. `axes` are the logical names of (out, in)."""

    width_in: int
    width_out: int
    axes: tuple[str, str]
    dtype: DTypeLike
    has_bias: bool = False

    def setup(self) -> None:
        self.weight_OI = matrix(self, (self.width_out, self.width_in), self.axes, self.dtype)
        if self.has_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[:1])
            self.bias_O = self.param("bias", init, (self.width_out,), self.dtype)

    def __call__(self, x_TI: Array) -> Array:
        axis = self.axes[1]
        if isinstance(self.weight_OI, QTensor):
            y_TO = self.weight_OI.matmul_total(x_TI, axis, self.dtype)
        elif self.has_bias:
            y_TO = collectives.total(matmul(x_TI, self.weight_OI), axis, self.dtype)
        else:
            y_TO = matmul_rounded(x_TI, self.weight_OI, axis, self.dtype)
        if self.has_bias:
            y_TO = y_TO + self.bias_O.astype(jnp.float32)
        return y_TO.astype(self.dtype)
