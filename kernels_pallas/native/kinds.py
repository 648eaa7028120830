"""The types of numbers that are multiplied: bfloat16 to float32 or rounded once, int8 to int32; by lanes or tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kernels_pallas.native import tiles
from kernels_pallas.native.vectors import PAIRS, dot_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """A type of numbers that is multiplied.

    Attributes:
      name: of the kernel.  item: LLVM's type of a number.  count: numbers of a register.  sum: type of a sum, and
        `out` of what is stored of it.
      bits: an integer as wide as a number.  declarations: what the IR uses.
      multiply: IR of sum + row · weight, of three names.  weight: IR of a weight register %{0} from %{0}_in, or "".
      magnitude: the bits of 8 bytes that tell a number from zero; there may be a sign.
      tiles: as tile registers take it.
    """

    name: str
    item: str
    count: int
    sum: str
    out: str
    bits: str
    declarations: str
    multiply: Callable[[str, str, str], str]
    magnitude: int
    tiles: tiles.TileKind
    weight: str = ""

    @property
    def bytes(self) -> int:
        return 64 // self.count

    @property
    def out_bytes(self) -> int:
        return 2 if self.out == "bfloat" else 4


def _multiply_int8(before: str, row: str, weight: str) -> str:
    return (
        f"call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> {before}, <16 x i32> {weight}, <16 x i32> {row})"
    )


BFLOAT16 = Numbers(
    name="jaxserve_dot", item="bfloat", count=PAIRS, sum="float", out="float", bits="i16",
    declarations="declare <32 x i16> @llvm.masked.load.v32i16.p0(ptr, i32, <32 x i1>, <32 x i16>)\n",
    multiply=lambda before, row, weight: dot_pairs(f"<16 x float> {before}", row, weight),
    magnitude=0x7FFF_7FFF_7FFF_7FFF,
    tiles=tiles.BFLOAT16,
)
ROUNDED = replace(BFLOAT16, name="jaxserve_dot_rounded", out="bfloat", declarations="")
INT8 = Numbers(
    name="jaxserve_dot_i8", item="i32", count=2 * PAIRS, sum="i32", out="i32", bits="i8",
    declarations="declare <64 x i8> @llvm.masked.load.v64i8.p0(ptr, i32, <64 x i1>, <64 x i8>)\n"
    "declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)\n",
    multiply=_multiply_int8,
    magnitude=-1,
    tiles=tiles.INT8,
    weight="  %{0} = xor <16 x i32> %{0}_in, splat (i32 -2139062144)",      # 0x80808080: 128 more, unsigned
)
