"""Packed weights: what an array of codes, its scales and what is beside them stand for.

    "int4", "int8"   W[o, i] = scale[o, g] · (code[o, i] − zero[o, g])    or  scale[o, g] · code[o, i] + offset[o, g]
    "lut4"           W[o, i] = scale[o, g] · table[o, code[o, i]]               one table a row, or one for all rows
    "fp4"            W[o, i] = scale[o, g] · float4_e2m1(code[o, i])
    "fp8"            W[o, i] = scale[o, g] · float8_e4m3fn(code[o, i])          g = i // (I / G), everything in float32

Codes lie along the inputs, one a byte. Of 4 bits, a block of 32 inputs takes 16 bytes: byte j holds code j in its low
half and code j + 16 in its high half, so that a register unpacks in two operations and the order stays. "fp4" has
blocks of 16 inputs, since its groups may be as short, and scales of 8 bits: powers of two (e8m0), or e4m3.
Invariant: unpacking is elementwise, so any rows, and any whole groups of columns, are a packed weight of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Code = Literal["int4", "int8", "lut4", "fp4", "fp8"]

BLOCK = 32          # inputs whose 4-bit codes share bytes
BLOCKS: dict[str, int] = {"int4": BLOCK, "lut4": BLOCK, "fp4": 16}
GROUP_MIN = 16      # inputs of a group at least
TABLE = 16          # values of a table
SCALES = (jnp.float16, jnp.float32)
SHORT_SCALES = (jnp.float8_e8m0fnu, jnp.float8_e4m3fn)     # of "fp4", too


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """A matrix [O, I] in packed form; every array may have further axes in front, which make it a stack of matrices.

    Attributes:
      code: how codes are read.
      code_OC: uint8; C is I, or I / 2 of 4-bit codes.
      scale_OG: float16 or float32; of "fp4" also float8_e8m0fnu or float8_e4m3fn.
      zero_OG: uint8, or None.  offset_OG: like the scales, or None. Integers have one of the two, others none.
      table_ET: float32 [O, 16] or [1, 16] of "lut4", else None.
    """

    code: Code = field(metadata={"static": True})
    code_OC: Array
    scale_OG: Array
    zero_OG: Array | None = None
    offset_OG: Array | None = None
    table_ET: Array | None = None

    @property
    def is_half(self) -> bool:
        """Whether a byte holds two codes."""
        return self.code in BLOCKS

    @property
    def shape(self) -> tuple[int, ...]:
        *outs, bytes_ = self.code_OC.shape
        return *outs, bytes_ * (2 if self.is_half else 1)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-1] // self.scale_OG.shape[-1]

    @property
    def extra(self) -> tuple[str, Array | None]:
        """What stands beside the scales, by name."""
        for name, array in (("zero", self.zero_OG), ("offset", self.offset_OG), ("table", self.table_ET)):
            if array is not None:
                return name, array
        return "none", None


def violations(weight: PackedWeight) -> list[str]:
    """What is wrong with the shapes and dtypes of a packed weight."""
    found = []
    if weight.code not in get_args(Code):
        return [f"code {weight.code!r} is none of {', '.join(get_args(Code))}"]
    (*stack, outs, ins), scale = weight.shape, weight.scale_OG
    if weight.code_OC.dtype != jnp.uint8:
        found.append(f"codes must be uint8, got {weight.code_OC.dtype}")
    allowed = (*SCALES, *SHORT_SCALES) if weight.code == "fp4" else SCALES
    if scale.dtype not in allowed:
        names = " or ".join(jnp.dtype(dtype).name for dtype in allowed)
        found.append(f"scales must be {names}, got {scale.dtype}")
    if scale.ndim < 2 or scale.shape[:-1] != (*stack, outs) or ins % scale.shape[-1]:
        return [*found, f"scales must be {[*stack, outs, 'G']} with G dividing {ins}, got {scale.shape}"]
    step = BLOCKS.get(weight.code, GROUP_MIN)
    if (weight.group_size % step and scale.shape[-1] > 1) or (weight.is_half and ins % step):
        found.append(f"groups of {weight.code} must be multiples of {step} inputs, got {weight.group_size}")
    beside = {"int4": ("zero", "offset"), "int8": ("zero", "offset"), "lut4": ("table",)}.get(weight.code, ("none",))
    name, extra = weight.extra
    given = sum(array is not None for array in (weight.zero_OG, weight.offset_OG, weight.table_ET))
    if name not in beside or given > 1:
        found.append(f"{weight.code} needs {' or '.join(beside)} beside the scales, got {given} of them, {name}")
    elif name == "zero" and (extra.dtype != jnp.uint8 or extra.shape != scale.shape):     # type: ignore[union-attr]
        found.append(f"zeros must be uint8 {scale.shape}, got {extra.dtype}{extra.shape}")     # type: ignore[union-attr]
    elif name == "offset" and (extra.dtype != scale.dtype or extra.shape != scale.shape):     # type: ignore[union-attr]
        found.append(f"offsets must be like the scales, got {extra.dtype}{extra.shape}")     # type: ignore[union-attr]
    elif name == "table" and (
        extra.dtype != jnp.float32 or extra.shape not in ((*stack, 1, TABLE), (*stack, outs, TABLE))     # type: ignore[union-attr]
    ):
        found.append(f"tables must be float32 [{outs} or 1, {TABLE}]")
    return found


def unpacked(weight: PackedWeight) -> Array:
    """The codes, one an element, uint8 [..., O, I]."""
    if not weight.is_half:
        return weight.code_OC
    (*outs, ins), size = weight.shape, BLOCKS[weight.code]
    block = weight.code_OC.reshape(*outs, ins // size, size // 2)
    return jnp.stack([block & 15, block >> 4], axis=-2).reshape(*outs, ins)


def dequantised(weight: PackedWeight, dtype: DTypeLike = jnp.float32) -> Array:
    """The matrix [..., O, I]: computed in float32, then rounded to `dtype`."""
    (*outs, ins), code_OI = weight.shape, unpacked(weight)
    groups = weight.scale_OG.shape[-1]

    def by_group(value_OI: Array) -> Array:
        return value_OI.reshape(*outs, groups, ins // groups)

    scale_OG1 = weight.scale_OG.astype(jnp.float32)[..., None]
    if weight.code == "fp8":
        value = by_group(jax.lax.bitcast_convert_type(code_OI, jnp.float8_e4m3fn).astype(jnp.float32)) * scale_OG1
    elif weight.code == "fp4":
        value = by_group(_float4(code_OI)) * scale_OG1
    elif weight.table_ET is not None:
        table_OT = jnp.broadcast_to(weight.table_ET, (*outs, TABLE))
        value = by_group(jnp.take_along_axis(table_OT, code_OI.astype(jnp.int32), axis=-1)) * scale_OG1
    elif weight.zero_OG is not None:
        zero_OG1 = weight.zero_OG.astype(jnp.float32)[..., None]
        value = (by_group(code_OI.astype(jnp.float32)) - zero_OG1) * scale_OG1
    else:
        assert weight.offset_OG is not None
        value = by_group(code_OI.astype(jnp.float32)) * scale_OG1 + weight.offset_OG.astype(jnp.float32)[..., None]
    return value.reshape(*outs, ins).astype(dtype)


def _float4(code: Array) -> Array:
    """Float32 of e2m1. Its bits in a float16's place mean 2^-14 of the value, subnormal ones, too."""
    bits = code.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type(((bits & 8) << 12) | ((bits & 7) << 9), jnp.float16)
    return half.astype(jnp.float32) * 2.0**14
