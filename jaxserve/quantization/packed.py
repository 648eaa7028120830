"""Packed weights of checkpoints on devices: as their codes were stored, multiplied without becoming a plain matrix.

    y = round(x)[order] · Wᵀ + x · sparseᵀ       W as `kernels_pallas.quantized_matmul` unpacks it

Rounding, where the format says so, is to the largest 8-bit float a row (or a group of its inputs) needs: what the
checkpoint was calibrated for. Inputs are taken in the order of their groups where groups are no runs of inputs.
Invariant: a packed matrix's devices hold whole groups; what cannot be cut so is not packed (`fits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.quantization.codes import (
    Activations,
    FloatCodes,
    Form,
    GroupCodes,
    Host,
    Packable,
    ShortFloatCodes,
    TableCodes,
)
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding import collectives
from jaxserve.sharding.split import Run, Runs
from kernels_pallas.eight_bit_matmul import eight_bit_matmul
from kernels_pallas.quantized_matmul import PackedWeight, quantized_matmul
from kernels_pallas.quantized_matmul.weights import BLOCKS, GROUP_MIN, TABLE, dequantised

FP8_MAX = np.float32(448.0)
TINY = np.float32(1e-30)

Cut = Callable[[Host, tuple[Runs, Runs]], Callable[[tuple[slice, ...]], Host]]
"""(an array of the whole matrix, what rows and columns of it each device has) -> a device's slice, by its index."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class Sparse:
    """Values at single places, added to a matrix: float32 [N] at (row, column)."""

    row_N: Array
    column_N: Array
    value_N: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor(QTensor):
    """Attributes:
    weight: codes and what they stand for.  order_I: int32, the input of each column, or None.
    input_scale: float32 [1] of "static" activations, or None.  sparse: what is added, or None.
    activations: how rows are rounded.  implementation: who multiplies, see `packing.multiplied_by`.
    """

    weight: PackedWeight
    order_I: Array | None = None
    input_scale: Array | None = None
    sparse: Sparse | None = None
    activations: Activations = field(default="none", metadata={"static": True})
    implementation: str | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def matmul(self, x_TI: Array, axis: str | None = None) -> Array:
        ordered_TI = x_TI if self.order_I is None else jnp.take(x_TI, self.order_I, axis=1, mode="clip")
        y_TO = self._product(ordered_TI, axis)
        if self.sparse is None:
            return y_TO
        x_TN = jnp.take(x_TI, self.sparse.column_N, axis=1, mode="clip").astype(jnp.float32)
        return y_TO.at[:, self.sparse.row_N].add(x_TN * self.sparse.value_N)

    def _product(self, x_TI: Array, axis: str | None) -> Array:
        asked = self.implementation
        if asked == "mosaic_gpu" and self.weight.code == "fp8" and self.activations != "none":
            return self._in_eight_bits(x_TI, axis, asked)
        rounded_TI, scale = self.rounded(x_TI, axis)
        return quantized_matmul(rounded_TI, self.weight, implementation=asked) * scale

    def _in_eight_bits(self, x_TI: Array, axis: str | None, implementation: str) -> Array:
        """The product of 8-bit floats as they are; scales meet sums, so none is rounded into a row or a weight."""
        code_OI = jax.lax.bitcast_convert_type(self.weight.code_OC, jnp.float8_e4m3fn)
        scale_OG = self.weight.scale_OG.astype(jnp.float32)
        groups = scale_OG.shape[1]
        x_TI = x_TI.astype(jnp.float32)
        if self.activations == "group":
            value_TGI, scale_TG1 = _rounded(x_TI.reshape(len(x_TI), groups, -1), None, None)
            value_TI, scale_TG = value_TGI.reshape(x_TI.shape), scale_TG1[..., 0]
        else:
            value_TI, scale_TG = _rounded(x_TI, self.input_scale, axis)
        scale_TG = jnp.broadcast_to(scale_TG, (len(x_TI), groups))
        scales = (scale_TG, scale_OG) if groups > 1 else ()
        y_TO = eight_bit_matmul(value_TI.astype(jnp.float8_e4m3fn), code_OI, *scales, implementation=implementation)
        return y_TO if groups > 1 else y_TO * scale_TG * scale_OG[:, 0]

    def rounded(self, x_TI: Array, axis: str | None) -> tuple[Array, Array | float]:
        """Rows as the format wants them, in their type, and what their products are multiplied by."""
        if self.activations == "none":
            return x_TI, 1.0
        if self.activations == "group":
            groups = self.weight.scale_OG.shape[-1]
            value_TGI, scale_TG1 = _rounded(x_TI.astype(jnp.float32).reshape(len(x_TI), groups, -1), None, None)
            # A scale a group cannot leave the sum: it goes back into the row, rounded once more to the row's type.
            return (value_TGI * scale_TG1).reshape(x_TI.shape).astype(x_TI.dtype), 1.0
        value_TI, scale_T1 = _rounded(x_TI.astype(jnp.float32), self.input_scale, axis)
        return value_TI.astype(x_TI.dtype), scale_T1

    def take(self, id_T: Array) -> Array:
        raise NotImplementedError("embeddings are not packed")

    def plain(self) -> Array:
        """The matrix, float32 [..., O, I], in the order of the inputs; for tests."""
        weight_OI = dequantised(self.weight)
        if self.order_I is not None:
            weight_OI = jnp.zeros_like(weight_OI).at[:, self.order_I].set(weight_OI)
        if self.sparse is not None:
            weight_OI = weight_OI.at[self.sparse.row_N, self.sparse.column_N].add(self.sparse.value_N)
        return weight_OI


def _rounded(x: Array, scale: Array | None, axis: str | None) -> tuple[Array, Array]:
    """Rows as 8-bit floats (in float32) and their scales, along the last axis."""
    if scale is None:
        scale = jnp.maximum(collectives.largest(jnp.abs(x).max(-1, keepdims=True), axis) / FP8_MAX, TINY)
    value = jnp.clip(x / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return value, scale


def group_size(form: Form, columns: Runs, device_count: int) -> int:
    """Inputs of a group such that every device, and every run of inputs that it has, holds whole groups; 0: none."""
    ins = sum(run.count for run in columns)
    sizes = [form.group or 0, ins]      # the last block of a scale may be cut: 576 inputs in blocks of 128
    if device_count > 1:
        sizes += [ins // device_count, *(part for run in columns for part in _edges(run))]
    size = math.gcd(*sizes) or ins
    step = BLOCKS.get(form.code, GROUP_MIN)
    return size if size % step == 0 or (size == ins and form.code not in BLOCKS) else 0


def fits(
    form: Form, columns: Runs, device_count: int = 1, *, is_stack: bool = False, has_all_rows: bool = True
) -> bool:
    """Whether devices can keep the form, of one matrix or of a stack of experts'.

    Args:
      columns: the inputs that they have, cut into `device_count` equal shares.
    """
    if is_stack and (
        form.has_order or form.sparse_count or form.code in ("w8a8", "lut4") or form.activations == "static"
    ):
        return False
    if form.code == "w8a8":
        return True
    if (form.has_order and device_count > 1) or (form.sparse_count and not (device_count == 1 and has_all_rows)):
        return False
    return group_size(form, columns, device_count) > 0


def _edges(run: Run) -> tuple[int, int]:
    return run.start or 0, run.count


def abstract(form: Form, leaf: jax.ShapeDtypeStruct, columns: Runs, device_count: int = 1) -> PackedTensor:
    """What a matrix, or a stack of them, becomes as shapes and placements; `leaf` is the plain one over all devices."""
    *outs, ins = leaf.shape
    axes = tuple(range(len(leaf.shape)))
    groups = ins // group_size(form, columns, device_count)

    def array(shape: tuple[int, ...], dtype: Any, axes: tuple[int | None, ...]) -> Any:
        placed = leaf.sharding
        if isinstance(placed, NamedSharding):
            spec = (*placed.spec, *(None for _ in leaf.shape))
            placed = NamedSharding(placed.mesh, PartitionSpec(*(None if at is None else spec[at] for at in axes)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def by_group(dtype: Any) -> Any:
        return array((*outs, groups), dtype, axes)

    extra = {
        "zero": lambda: {"zero_OG": by_group(jnp.uint8)},
        "offset": lambda: {"offset_OG": by_group(form.scale)},
        "table": lambda: {"table_ET": array((*outs, TABLE), jnp.float32, (*axes[:-1], None))},
        "shared table": lambda: {"table_ET": array((1, TABLE), jnp.float32, (None, None))},
        "none": dict,
    }[form.extra]()
    assert form.code != "w8a8"
    bytes_ = ins // 2 if form.code in BLOCKS else ins
    weight = PackedWeight(
        code=form.code, code_OC=array((*outs, bytes_), jnp.uint8, axes), scale_OG=by_group(form.scale), **extra
    )
    count = form.sparse_count
    sparse = None if not count else Sparse(
        row_N=array((count,), jnp.int32, (None,)), column_N=array((count,), jnp.int32, (None,)),
        value_N=array((count,), jnp.float32, (None,)),
    )
    return PackedTensor(
        weight=weight, order_I=array((ins,), jnp.int32, (None,)) if form.has_order else None,
        input_scale=array((1,), jnp.float32, (None,)) if form.activations == "static" else None,
        sparse=sparse, activations=form.activations,
    )


def make(
    like: PackedTensor, codes: Packable, layout: tuple[Runs, ...], cut: Cut,
    empty: Callable[..., Host],
) -> PackedTensor:
    """The tensor on its devices.

    Args:
      like: of abstract values, placed.  layout: what of the whole matrix the devices have, along each axis.
      codes: of a stack, one matrix under the other.
      cut: see `Cut`.  empty: memory (shape, dtype) that a device adopts.
    """
    weight, (*rows, columns) = like.weight, layout
    size = sum(run.count for run in columns) // weight.scale_OG.shape[-1]
    by_group = (*rows, tuple(_in_groups(run, size) for run in columns))
    stack = tuple(_size(runs) for runs in rows)

    def put(leaf: Any, whole: Host, runs: tuple[Runs, ...]) -> Array:
        slices = cut(np.ascontiguousarray(whole).astype(leaf.dtype, copy=False), runs)     # type: ignore[arg-type]
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, slices).block_until_ready()

    code_OI, order_I = _codes(codes)
    if order_I is not None:
        code_OI = code_OI[:, order_I]
    of_codes = cut(code_OI.reshape(*stack, -1), layout)
    packed = _halves(of_codes, empty, BLOCKS[weight.code]) if weight.is_half else of_codes
    code_OC = jax.make_array_from_callback(weight.code_OC.shape, weight.code_OC.sharding, packed).block_until_ready()
    found: dict[str, Array] = {}
    for name, whole in _beside(codes, size).items():
        if name == "table_ET" and len(whole) == 1:
            found[name] = put(getattr(weight, name), whole, ((Run(0, 1),), (Run(0, TABLE),)))
            continue
        runs = by_group if name != "table_ET" else (*rows, (Run(0, TABLE),))
        found[name] = put(getattr(weight, name), whole.reshape(*stack, -1), runs)
    return PackedTensor(
        weight=PackedWeight(code=weight.code, code_OC=code_OC, **found),
        order_I=None if like.order_I is None else put(like.order_I, order_I, (_all(order_I),)),     # type: ignore[arg-type]
        input_scale=None if like.input_scale is None else put(
            like.input_scale, np.array([codes.input_scale]), ((Run(0, 1),),)     # type: ignore[union-attr]
        ),
        sparse=None if like.sparse is None else Sparse(**{
            name: put(getattr(like.sparse, name), getattr(codes, name), (_all(getattr(codes, name)),))
            for name in ("row_N", "column_N", "value_N")
        }),
        activations=like.activations,
    )


def _size(runs: Runs) -> int:
    """Rows of the whole axis: where the last run that is not padding ends."""
    return max(run.start + run.count for run in runs if run.start is not None)


def _all(values: Host | None) -> Runs:
    assert values is not None
    return (Run(0, len(values)),)


def _in_groups(run: Run, size: int) -> Run:
    return Run(None if run.start is None else run.start // size, run.count // size)


def _codes(codes: Packable) -> tuple[Host, Host | None]:
    """Codes [O, I], and the order in which inputs of one group follow each other."""
    if isinstance(codes, FloatCodes):
        return codes.bits_OI, None
    if isinstance(codes, GroupCodes) and codes.group_I is not None:
        return codes.code_OI, np.argsort(codes.group_I, kind="stable").astype(np.int32)
    return codes.code_OI, None


def _beside(codes: Packable, size: int) -> dict[str, Host]:
    """Scales and what is beside them, whole, in groups of `size` inputs."""
    if isinstance(codes, FloatCodes):
        return {"scale_OG": codes.scale_by_group(size)}

    def finer(whole_OG: Host) -> Host:
        """Each group's number, once for every part of it."""
        return np.repeat(whole_OG, codes.code_OI.shape[1] // whole_OG.shape[1] // size, axis=1)

    if isinstance(codes, TableCodes):
        outs, values = codes.table_ET.shape
        table_ET = np.zeros((outs, TABLE), np.float32)
        table_ET[:, :values] = codes.table_ET
        scale_OG = np.broadcast_to(codes.scale_OG, (len(codes.code_OI), codes.scale_OG.shape[1]))
        return {"scale_OG": finer(scale_OG), "table_ET": table_ET}
    if isinstance(codes, ShortFloatCodes):
        return {"scale_OG": finer(codes.scale_OG)}
    if codes.zero_OG is not None:
        return {"scale_OG": finer(codes.scale_OG), "zero_OG": finer(codes.zero_OG)}
    assert codes.offset_OG is not None
    return {"scale_OG": finer(codes.scale_OG), "offset_OG": finer(codes.offset_OG)}


def _halves(slices: Callable[[tuple[slice, ...]], Host], empty: Callable[..., Host], size: int) -> Any:
    """Two codes a byte, as `kernels_pallas.quantized_matmul.weights` lays them."""
    def read(index: tuple[slice, ...]) -> Host:
        *rows, bytes_ = index
        start, stop = bytes_.start or 0, bytes_.stop
        code_OI = slices((*rows, slice(2 * start, None if stop is None else 2 * stop)))
        *outs, ins = code_OI.shape
        block = code_OI.reshape(*outs, ins // size, 2, size // 2)
        out = empty((*outs, ins // 2), np.dtype(np.uint8))
        into = out.reshape(*outs, ins // size, size // 2)
        np.left_shift(block[..., 1, :], 4, out=into)
        into |= block[..., 0, :]
        return out

    return read
