"""IR of sums and powers over AVX-512 registers of 16 float32 lanes, for the kernels to build on."""

from __future__ import annotations

import struct
from math import e, log2

LANES = 16
LOG2_E = log2(e)
PAIRS = 32          # bfloat16 numbers of a register, multiplied two by two

DECLARATIONS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare i64 @llvm.vector.reduce.or.v8i64(<8 x i64>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
"""

# Of 2^x on [-1/2, 1/2], the first being 1: minimax of relative error, 9.2e-8 and 2.8e-6 (least squares over Chebyshev's
# points, weighed anew until the error's peaks are equal).
POWER = (1.0, 0.69314698, 0.24022242, 0.05550734, 0.00967151, 0.00132647)
POWER_SHORT = (1.0, 0.69312419, 0.24024099, 0.05590643, 0.00958285)     # for what is rounded to bfloat16 (2e-3)
POWER_MIN = -127.0      # here and below 2^x is 0: the bits of 1 less 127 times that of an exponent
MAGIC = 1.5 * 2**23     # added to a small float32, the nearest whole number is in its lowest bits


def indices(values: list[int]) -> str:
    return f"<{len(values)} x i32> <{', '.join(f'i32 {value}' for value in values)}>"


def lane_sums(names: list[str], prefix: str = "fold", kind: str = "float") -> tuple[str, str]:
    """IR that adds up the lanes of 16 registers, and the name of the one whose lane j is the sum of the j-th."""
    lines, step = [], LANES // 2
    add, lanes = "fadd" if kind == "float" else "add", f"<16 x {kind}>"
    while step:
        folded = []
        for first, second in zip(names[:step], names[step:], strict=True):
            starts = [group * 2 * step + side for group in range(LANES // 2 // step) for side in (0, LANES)]
            low = [start + lane for start in starts for lane in range(step)]
            high = [lane + step for lane in low]
            name = f"%{prefix}{step}_{len(folded)}"
            lines.append(
                f"  {name}_l = shufflevector {lanes} {first}, {lanes} {second}, {indices(low)}\n"
                f"  {name}_h = shufflevector {lanes} {first}, {lanes} {second}, {indices(high)}\n"
                f"  {name} = {add} {lanes} {name}_l, {name}_h"
            )
            folded.append(name)
        names, step = folded, step // 2
    return "\n".join(lines), names[0]


def transposed(rows: list[str], prefix: str = "turned") -> tuple[list[str], list[str]]:
    """IR that turns 16 registers of 16 lanes of 4 bytes, and the names of the 16 that lanes have become."""
    lines, step, each = [], 1, range(LANES)
    while step < LANES:     # exchanges bit after bit of a number's row with that of its lane
        low = [lane if not lane & step else LANES + lane - step for lane in each]
        high = [lane + step if not lane & step else LANES + lane for lane in each]
        exchanged = list(rows)
        for row in each:
            if row & step:
                continue
            for to, order in ((row, low), (row + step, high)):
                exchanged[to] = f"%{prefix}{step}_{to}"
                lines.append(
                    f"  {exchanged[to]} = shufflevector <16 x i32> {rows[row]}, <16 x i32> {rows[row + step]}, "
                    f"{indices(order)}"
                )
        rows, step = exchanged, 2 * step
    return lines, rows


def number(value: float) -> str:
    """A float32 constant, which LLVM wants as an exact double."""
    (nearest,) = struct.unpack("<f", struct.pack("<f", value))
    return f"0x{struct.unpack('<Q', struct.pack('<d', nearest))[0]:016X}"


def splat(value: float) -> str:
    """A register of one constant."""
    return f"<16 x float> splat (float {number(value)})"


def broadcast(name: str, value: str, kind: str = "float") -> str:
    """IR of a register %name with `value` in every lane."""
    return (
        f"  %{name}_lane = insertelement <16 x {kind}> poison, {kind} {value}, i64 0\n"
        f"  %{name} = shufflevector <16 x {kind}> %{name}_lane, <16 x {kind}> poison, <16 x i32> zeroinitializer"
    )


def larger(name: str, first: str, second: str, lanes: int = LANES) -> str:
    """IR of %name, the larger number a lane; `second` where one is NaN, so it should be none. One instruction."""
    return (
        f"  %{name}_is = fcmp ogt <{lanes} x float> {first}, {second}\n"
        f"  %{name} = select <{lanes} x i1> %{name}_is, <{lanes} x float> {first}, <{lanes} x float> {second}"
    )


def largest(name: str, of: str) -> str:
    """IR of float %name, the largest of 16 lanes, none of them NaN: half by half, not lane after lane."""
    lines, lanes = [], LANES
    while lanes > 1:
        lanes //= 2
        for half, first in (("l", 0), ("h", lanes)):
            lines.append(
                f"  %{name}{lanes}{half} = shufflevector <{2 * lanes} x float> {of}, <{2 * lanes} x float> poison, "
                f"{indices(list(range(first, first + lanes)))}"
            )
        lines.append(larger(f"{name}{lanes}", f"%{name}{lanes}l", f"%{name}{lanes}h", lanes))
        of = f"%{name}{lanes}"
    lines.append(f"  %{name} = extractelement <1 x float> {of}, i64 0")
    return "\n".join(lines)


def dot_pairs(before: str, first: str, second: str) -> str:
    """The call that adds 32 products, two a lane, to `before` (with its type)."""
    return (
        f"call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512({before}, <32 x bfloat> {first}, <32 x bfloat> {second})"
    )


def powers() -> str:
    """IR of @power(x) and @power_short(x): 2^x a lane, for x <= 0; NaN gives 0."""
    return _power("power", POWER) + _power("power_short", POWER_SHORT)


def _power(name: str, terms: tuple[float, ...]) -> str:
    fma = "call <16 x float> @llvm.fma.v16f32"
    result, lines = splat(terms[-1]), []
    for n in reversed(range(len(terms) - 1)):
        lines.append(f"  %p{n} = {fma}({result}, <16 x float> %part, {splat(terms[n])})")
        result = f"<16 x float> %p{n}"
    return f"""
define internal <16 x float> @{name}(<16 x float> %x) alwaysinline {{
{larger("low", "%x", splat(POWER_MIN).removeprefix("<16 x float> "))}
  %marked = fadd {splat(MAGIC)}, %low
  %whole = fsub <16 x float> %marked, {splat(MAGIC).removeprefix("<16 x float> ")}
  %part = fsub <16 x float> %low, %whole
{chr(10).join(lines)}
  %marked_bits = bitcast <16 x float> %marked to <16 x i32>
  %exponent = shl <16 x i32> %marked_bits, splat (i32 23)
  %bits = bitcast {result} to <16 x i32>
  %scaled = add <16 x i32> %bits, %exponent
  %result = bitcast <16 x i32> %scaled to <16 x float>
  ret <16 x float> %result
}}
"""
