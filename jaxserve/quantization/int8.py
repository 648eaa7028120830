"""Eight-bit weights with one scale an output, met by activations rounded to 8 bits: `--quantization int8`, and w8a8
checkpoints.

    scale_o = max_i |w_oi| / 127        code_oi = round(w_oi / scale_o)
    scale_t = max_i |x_ti| / 127        code_ti = round(x_ti / scale_t)
    y_to    = scale_t · scale_o · Σ_i code_ti · code_oi

Symmetric, round half to even, dynamic by token: the w8a8 scheme of LLM.int8 (Dettmers et al. 2022, vector-wise part)
and of compressed-tensors' "int-quantized"; "static" checkpoints bring scale_t, one for all tokens. The sum is exact in
integers, so a row's result does not depend on the rows beside it; a row that lies on several devices has one scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.quantization.codes import Host, IntCodes
from jaxserve.quantization.packed import Cut
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding import collectives
from jaxserve.sharding.split import Run, Runs
from kernels_pallas.eight_bit_matmul import eight_bit_matmul
from kernels_pallas.lanes import ROWS_MAX, lane_matmul_int8
from kernels_pallas.native import api as native

CODE_MAX = 127
TINY = np.float32(1e-30)        # the scale of a row of zeros
CHUNK_BYTES = 4 << 20           # of float32 rows quantised at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Int8Tensor(QTensor):
    """Attributes:
    codes_OI: int8.  scale_O: float32.
    input_scale: float32 [1], of all rows, or None.  implementation: who multiplies, see `packing.multiplied_by`.
    """

    codes_OI: Array
    scale_O: Array
    input_scale: Array | None = None
    implementation: str | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        outs, ins = self.codes_OI.shape
        return outs, ins

    def matmul(self, x_TI: Array, axis: str | None = None) -> Array:
        codes_TI, scale_T1 = quantise(x_TI.astype(jnp.float32), self.input_scale, axis)
        return self._scaled(int8_dot(codes_TI, self.codes_OI, self.implementation), scale_T1)

    def matmul_total(self, x_TI: Array, axis: str, dtype: DTypeLike) -> Array:
        """In float32 the integers are added up, which take no more room: so many devices give what one gives."""
        if dtype != jnp.float32:
            return collectives.total(self.matmul(x_TI, axis), axis, dtype)
        codes_TI, scale_T1 = quantise(x_TI.astype(jnp.float32), self.input_scale, axis)
        sum_TO = int8_dot(codes_TI, self.codes_OI, self.implementation)
        return self._scaled(collectives.total(sum_TO, axis, jnp.int32), scale_T1)

    def _scaled(self, sum_TO: Array, scale_T1: Array) -> Array:
        return sum_TO.astype(jnp.float32) * scale_T1 * self.scale_O

    def take(self, id_T: Array) -> Array:
        codes_TI = jnp.take(self.codes_OI, id_T, axis=0, mode="clip")
        return codes_TI.astype(jnp.float32) * jnp.take(self.scale_O, id_T, mode="clip")[:, None]


def quantise(x_TI: Array, scale: Array | None = None, axis: str | None = None) -> tuple[Array, Array]:
    """Codes [T, I] and scales [T, 1] (or the one given) of float32 rows, whose inputs are cut along `axis`."""
    if scale is not None:
        return jnp.clip(jnp.round(x_TI / scale), -CODE_MAX - 1, CODE_MAX).astype(jnp.int8), scale
    largest_T1 = collectives.largest(jnp.abs(x_TI).max(-1, keepdims=True), axis)
    scale_T1 = jnp.maximum(largest_T1 / CODE_MAX, TINY)
    return jnp.round(x_TI / scale_T1).astype(jnp.int8), scale_T1


def int8_dot(x_TI: Array, weight_OI: Array, implementation: str | None = None) -> Array:
    """x · weightᵀ of int8 in int32, exact."""
    if implementation is not None:
        return eight_bit_matmul(x_TI, weight_OI, implementation=implementation)
    if native.serves_int8(*weight_OI.shape):
        return jax.lax.platform_dependent(x_TI, weight_OI, cpu=native.matmul_int8, default=_dot)
    if x_TI.shape[0] <= ROWS_MAX:
        return jax.lax.platform_dependent(x_TI, weight_OI, cpu=lane_matmul_int8, default=_dot)
    return _dot(x_TI, weight_OI)


def _dot(x_TI: Array, weight_OI: Array) -> Array:
    return jnp.einsum("TI,OI->TO", x_TI, weight_OI, preferred_element_type=jnp.int32)


def abstract(weight: jax.ShapeDtypeStruct, *, is_static: bool = False) -> Int8Tensor:
    """What a matrix becomes, as shapes and placements."""
    codes = jax.ShapeDtypeStruct(weight.shape, jnp.int8, sharding=weight.sharding)
    rows = whole = weight.sharding
    if isinstance(rows, NamedSharding):
        rows, whole = NamedSharding(rows.mesh, PartitionSpec(*rows.spec[:1])), NamedSharding(rows.mesh, PartitionSpec())
    scale_O = jax.ShapeDtypeStruct(weight.shape[:1], jnp.float32, sharding=rows)
    input_scale = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=whole) if is_static else None
    return Int8Tensor(codes, scale_O, input_scale)  # type: ignore[arg-type]


def adopt(like: Int8Tensor, codes: IntCodes, layout: tuple[Runs, Runs], cut: Cut) -> Int8Tensor:
    """The tensor of a checkpoint's codes; `layout` and `cut` as in `packed.make`."""
    def put(leaf: Any, whole: Host, runs: tuple[Runs, ...]) -> Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, cut(whole, runs)).block_until_ready()

    static = None if like.input_scale is None else put(
        like.input_scale, np.array([codes.input_scale], np.float32), ((Run(0, 1),),)
    )
    return Int8Tensor(
        put(like.codes_OI, codes.code_OI, layout), put(like.scale_O, codes.scale_O, layout[:1]), static
    )


def make(like: Int8Tensor, read: Callable[[slice], np.ndarray[Any, Any]], empty: Callable[..., Any]) -> Int8Tensor:
    """Quantises a matrix a few rows at a time.

    Args:
      like: of abstract values, placed.  read: whole float32 rows.  empty: memory (shape, dtype) that a device adopts.
    """
    outs, ins = like.shape
    scale_O = np.empty(outs, np.float32)
    step = max(1, CHUNK_BYTES // (4 * ins))

    def codes(index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        rows, columns = (range(*part.indices(size)) for part, size in zip(index, like.shape, strict=True))
        out = empty((len(rows), len(columns)), np.dtype(np.int8))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            values = read(slice(start, stop)).astype(np.float32, copy=False)
            scale = np.maximum(np.abs(values).max(1) / np.float32(CODE_MAX), TINY)
            scale_O[start:stop] = scale
            wanted = values[:, columns.start : columns.stop] / scale[:, None]
            out[start - rows.start : stop - rows.start] = np.rint(wanted, out=wanted)
        return out

    codes_OI = jax.make_array_from_callback(like.shape, like.codes_OI.sharding, codes).block_until_ready()
    return Int8Tensor(codes_OI, jax.make_array_from_callback((outs,), like.scale_O.sharding, lambda i: scale_O[i]))
