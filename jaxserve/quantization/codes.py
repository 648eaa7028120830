"""What a packed matrix is on the host, whatever format it was stored in: integer codes and what they stand for.

Formats (`quantization.formats`) make these from stored tensors; `quantization.packed` makes of them what devices keep.
Knows numpy only. Invariant: `dequantised` is the format's own formula, in float32; it is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

Host = np.ndarray[Any, np.dtype[Any]]

# The values of e2m1 by their bits: OCP Microscaling Formats 1.0, 5.3.3.
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Rows as they come; rounded by their own largest value, or that of each group of inputs; by one stored scale.
Activations = Literal["none", "token", "group", "static"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a packed matrix is kept on devices; everything that a program's shapes depend on.

    Attributes:
      code: as `kernels_pallas.quantized_matmul` reads it; "w8a8": int8 on both sides.
      group: inputs that share a scale; None: all of them.
      scale: dtype of the scales; of 8 bits beside "fp4" only.
      extra: beside the scales "zero", "offset", "table" (one an output), "shared table", or "none".
      has_order: inputs are sorted by group first (act-order).
      sparse_count: values that are added at single places.
      activations: how rows are rounded before the product.
    """

    code: Literal["int4", "int8", "lut4", "fp4", "fp8", "w8a8"]
    group: int | None = None
    scale: Literal["float16", "float32", "float8_e8m0fnu"] = "float32"
    extra: Literal["zero", "offset", "table", "shared table", "none"] = "none"
    has_order: bool = False
    sparse_count: int = 0
    activations: Activations = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCodes:
    """Integer weights in groups along the inputs: W = scale · (code − zero), or scale · code + offset.

    Attributes:
      code_OI: uint8, one code an element, below 2^bits.
      scale_OG: float16, bfloat16 or float32.
      zero_OG: uint8, or None.  offset_OG: like the scales, or None; exactly one of the two is there.
      group_I: int32, the group of each input (GPTQ's act-order); None: equal groups one after the other.
    """

    code_OI: Host
    bits: int
    scale_OG: Host
    zero_OG: Host | None = None
    offset_OG: Host | None = None
    group_I: Host | None = None

    def dequantised(self) -> Host:
        """The matrix, float32 [O, I]."""
        group_I = _groups(self.group_I, self.code_OI.shape[1], self.scale_OG.shape[1])
        code_OI, scale_OI = self.code_OI.astype(np.float32), self.scale_OG.astype(np.float32)[:, group_I]
        if self.zero_OG is not None:
            return scale_OI * (code_OI - self.zero_OG.astype(np.float32)[:, group_I])
        assert self.offset_OG is not None
        return scale_OI * code_OI + self.offset_OG.astype(np.float32)[:, group_I]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCodes:
    """Four-bit (or shorter) codes that point into a table: W = scale · table[code], plus what is kept exactly.

    Attributes:
      code_OI: uint8 below 16.
      table_ET: float32 [O, 16] or, one for all rows, [1, 16].
      scale_OG: float32.
      row_N, column_N, value_N: float32 values that are added at single places, or None.
    """

    code_OI: Host
    table_ET: Host
    scale_OG: Host
    row_N: Host | None = None
    column_N: Host | None = None
    value_N: Host | None = None

    def dequantised(self) -> Host:
        """The matrix, float32 [O, I]."""
        outs, ins = self.code_OI.shape
        table_OT = np.broadcast_to(self.table_ET, (outs, self.table_ET.shape[1]))
        value_OI = np.take_along_axis(table_OT, self.code_OI.astype(np.intp), axis=1)
        value_OI = value_OI * self.scale_OG[:, _groups(None, ins, self.scale_OG.shape[1])]
        if self.value_N is not None:
            np.add.at(value_OI, (self.row_N, self.column_N), self.value_N)
        return value_OI


@dataclass(frozen=True, kw_only=True, slots=True)
class IntCodes:
    """Eight-bit integers with one scale an output, met by activations in eight bits.

    Attributes:
      code_OI: int8.  scale_O: float32.
      activations: "token" (each row by its own largest value), or "static" by `input_scale`.
    """

    code_OI: Host
    scale_O: Host
    activations: Activations
    input_scale: float | None = None

    def dequantised(self) -> Host:
        """The matrix, float32 [O, I]."""
        return self.code_OI.astype(np.float32) * self.scale_O[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatCodes:
    """Eight-bit floats (e4m3, no infinities) with scales: W = scale · value.

    Attributes:
      bits_OI: uint8, the stored bits.
      scale_AB: float32: [1, 1] for the whole matrix, [O, 1] an output, or one a block.
      block: rows and columns that share a scale.
      activations: how rows are rounded before the product; "static" by `input_scale`.
    """

    bits_OI: Host
    scale_AB: Host
    block: tuple[int, int]
    activations: Activations = "none"
    input_scale: float | None = None

    def scale_by_group(self, group: int) -> Host:
        """Scales [O, G] of groups of `group` inputs, which blocks are made of."""
        outs, ins = self.bits_OI.shape
        row_O, column_G = np.arange(outs) // self.block[0], np.arange(0, ins, group) // self.block[1]
        return self.scale_AB[row_O][:, column_G]

    def dequantised(self) -> Host:
        """The matrix, float32 [O, I]."""
        return self.bits_OI.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * self.scale_by_group(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortFloatCodes:
    """Four-bit floats (e2m1) in groups along the inputs: W = scale · value.

    Attributes:
      code_OI: uint8 below 16, the stored bits.
      scale_OG: float8_e8m0fnu.
    """

    code_OI: Host
    scale_OG: Host

    def dequantised(self) -> Host:
        """The matrix, float32 [O, I]."""
        group_I = _groups(None, self.code_OI.shape[1], self.scale_OG.shape[1])
        return FLOAT4[self.code_OI] * self.scale_OG.astype(np.float32)[:, group_I]


Codes = GroupCodes | TableCodes | IntCodes | FloatCodes | ShortFloatCodes
Packable = GroupCodes | TableCodes | FloatCodes | ShortFloatCodes     # what a `PackedTensor` is made of


def _groups(group_I: Host | None, ins: int, groups: int) -> Host:
    return np.arange(ins) // -(-ins // groups) if group_I is None else group_I
