"""Blocks of GGUF files as codes: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL.

    W = d · (q − zero)              Q4_0 (8), Q5_0 (16), Q8_0 (signed)                          32 elements a scale
    W = d · q + m                   Q4_1, Q5_1                                                  32
    W = d · s · (q − zero)          Q3_K (4), Q6_K (32): s signed, 6 and 8 bits                 16
    W = d · s · q − dmin · m        Q2_K: s and m of 4 bits; Q4_K, Q5_K: of 6                   16; 32
    W = d · TABLE[q]                IQ4_NL                                                      32

d, m and dmin are float16. A row is whole blocks of 32 elements, or of 256 where s and m are stored (K). A kind of
block is a numpy structure, so an array of blocks [O, blocks] says itself what it holds.
Source: ggml's block structures (ggml-common.h), by their layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.quantization.codes import Codes, Form, GroupCodes, Host, TableCodes
from jaxserve.quantization.formats.scheme import Scheme, Stored

SUPER = 256     # elements of a block that has scales of scales
TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
HALF = ("d", "<f2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of block.

    Attributes:
      size: elements of a block.  group: elements that share a scale.  bits: that hold every code; 3 to 6 take 8.
      zero: what is subtracted from codes; None: `scales` gives offsets, or the table says.
      codes: blocks [O, B] -> uint8 [O, B, size].  scales: blocks -> scales, and offsets or None, [O, B, size / group].
    """

    name: str
    dtype: np.dtype[Any]
    size: int
    group: int
    bits: int
    zero: int | None
    codes: Callable[[Host], Host]
    scales: Callable[[Host], tuple[Host, Host | None]]
    is_table: bool = False

    @property
    def extra(self) -> Literal["zero", "offset", "shared table"]:
        return "shared table" if self.is_table else "offset" if self.zero is None else "zero"


class GgufScheme(Scheme):
    """Blocks say themselves what they are; the reader of files calls a module's blocks `blocks`."""

    __slots__ = ()

    method = "gguf"
    suffixes = ("blocks",)
    marks = ("blocks",)
    needs_packed = False

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        blocks = stored["blocks"]
        if blocks.dtype not in BY_DTYPE or blocks.ndim != 2:
            raise WeightsError(f"{module}: {list(blocks.shape)} of {blocks.dtype} are no blocks of a matrix")
        return blocks.shape[0], blocks.shape[1] * BY_DTYPE[blocks.dtype].size

    def form(self, module: str, stored: Stored) -> Form:
        _, ins = self.shape(module, stored)
        kind = BY_DTYPE[stored["blocks"].dtype]
        scale: Literal["float16", "float32"] = "float16" if kind.size < SUPER and not kind.is_table else "float32"
        return Form(
            code="lut4" if kind.is_table else "int4" if kind.bits == 4 else "int8", extra=kind.extra, scale=scale,
            group=None if ins == kind.group else kind.group,
        )

    def codes(self, module: str, stored: Stored) -> Codes:
        shape, blocks = self.shape(module, stored), np.asarray(stored["blocks"])
        kind = BY_DTYPE[blocks.dtype]
        scale, offset = (None if part is None else part.reshape(shape[0], -1) for part in kind.scales(blocks))
        assert scale is not None
        for part in (scale, offset):
            if part is not None and not np.isfinite(part).all():
                raise WeightsError(f"{module}: scales of {kind.name} blocks hold infinities or NaN")
        code_OI = kind.codes(blocks).reshape(shape)
        if kind.is_table:
            return TableCodes(code_OI=code_OI, table_ET=TABLE[None], scale_OG=scale.astype(np.float32))
        zero_OG = None if kind.zero is None else np.full(scale.shape, kind.zero, np.uint8)
        return GroupCodes(code_OI=code_OI, bits=kind.bits, scale_OG=scale, zero_OG=zero_OG, offset_OG=offset)


def _halves(qs: Host) -> Host:
    """Lower halves of some bytes, then the upper ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _runs(qs: Host, run: int, bits: int) -> Host:
    """Of each run of bytes the lowest bits in turn, then the next: [..., bytes · 8 / bits]."""
    runs = qs.reshape(*qs.shape[:-1], -1, 1, run)
    shift = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shift) & np.uint8((1 << bits) - 1)).reshape(*qs.shape[:-1], -1)


def _fifth(blocks: Host) -> Host:
    """Bit i of 32 is the fifth of element i."""
    return np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4


def _d(blocks: Host) -> tuple[Host, Host | None]:
    return blocks["d"], None


def _d_and_m(blocks: Host) -> tuple[Host, Host | None]:
    return blocks["d"], blocks["m"]


def _wide(blocks: Host, name: str) -> Host:
    return blocks[name].astype(np.float32)[..., None]


def _six_bits(blocks: Host) -> tuple[Host, Host | None]:
    """Eight scales and eight minima of 6 bits in 12 bytes: whole in the first eight, in parts for the last four."""
    first, second, rest = (blocks["scales"][..., at : at + 4] for at in (0, 4, 8))
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=-1)
    least = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=-1)
    return _wide(blocks, "d") * scale.astype(np.float32), -(_wide(blocks, "dmin") * least.astype(np.float32))


def _four_bits(blocks: Host) -> tuple[Host, Host | None]:
    both = blocks["scales"]
    scale, least = (both & 15).astype(np.float32), (both >> 4).astype(np.float32)
    return _wide(blocks, "d") * scale, -(_wide(blocks, "dmin") * least)


def _signed_six_bits(blocks: Host) -> tuple[Host, Host | None]:
    """Sixteen scales in 12 bytes: four bits of each in the first eight, two in the last four; 32 is 0."""
    scale = _halves(blocks["scales"][..., :8]) | _runs(blocks["scales"][..., 8:], 4, 2) << 4
    return _wide(blocks, "d") * (scale.astype(np.float32) - 32), None


def _signed_bytes(blocks: Host) -> tuple[Host, Host | None]:
    return _wide(blocks, "d") * blocks["scales"].astype(np.float32), None


def _kind(
    name: str, fields: list[Any], size: int, group: int, bits: int, zero: int | None, codes: Callable[[Host], Host],
    scales: Callable[[Host], tuple[Host, Host | None]], is_table: bool = False,
) -> Kind:
    return Kind(
        name=name, dtype=np.dtype(fields), size=size, group=group, bits=bits, zero=zero, codes=codes, scales=scales,
        is_table=is_table,
    )


_QS = ("qs", "u1", (16,))
_QH = ("qh", "u1", (4,))
_D_DMIN = (HALF, ("dmin", "<f2"))

# By ggml's number of the type.
KINDS: dict[int, Kind] = {
    2: _kind("Q4_0", [HALF, _QS], 32, 32, 4, 8, lambda b: _halves(b["qs"]), _d),
    3: _kind("Q4_1", [HALF, ("m", "<f2"), _QS], 32, 32, 4, None, lambda b: _halves(b["qs"]), _d_and_m),
    6: _kind("Q5_0", [HALF, _QH, _QS], 32, 32, 8, 16, lambda b: _halves(b["qs"]) | _fifth(b), _d),
    7: _kind("Q5_1", [HALF, ("m", "<f2"), _QH, _QS], 32, 32, 8, None, lambda b: _halves(b["qs"]) | _fifth(b), _d_and_m),
    # Adding 128 to a signed byte turns its uppermost bit.
    8: _kind("Q8_0", [HALF, ("qs", "u1", (32,))], 32, 32, 8, 128, lambda b: b["qs"] ^ np.uint8(128), _d),
    10: _kind(
        "Q2_K", [("scales", "u1", (16,)), ("qs", "u1", (64,)), *_D_DMIN], SUPER, 16, 8, None,
        lambda b: _runs(b["qs"], 32, 2), _four_bits,
    ),
    11: _kind(
        "Q3_K", [("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), HALF], SUPER, 16, 8, 4,
        lambda b: _runs(b["qs"], 32, 2) | _runs(b["hmask"], 32, 1) << 2, _signed_six_bits,
    ),
    12: _kind(
        "Q4_K", [*_D_DMIN, ("scales", "u1", (12,)), ("qs", "u1", (128,))], SUPER, 32, 4, None,
        lambda b: _runs(b["qs"], 32, 4), _six_bits,
    ),
    13: _kind(
        "Q5_K", [*_D_DMIN, ("scales", "u1", (12,)), ("qh", "u1", (32,)), ("qs", "u1", (128,))], SUPER, 32, 8, None,
        lambda b: _runs(b["qs"], 32, 4) | _runs(b["qh"], 32, 1) << 4, _six_bits,
    ),
    14: _kind(
        "Q6_K", [("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), HALF], SUPER, 16, 8, 32,
        lambda b: _runs(b["ql"], 64, 4) | _runs(b["qh"], 32, 2) << 4, _signed_bytes,
    ),
    20: _kind(
        "IQ4_NL", [HALF, ("indices", "u1", (16,))], 32, 32, 4, None, lambda b: _halves(b["indices"]), _d, is_table=True
    ),
}
BY_DTYPE = {kind.dtype: kind for kind in KINDS.values()}
