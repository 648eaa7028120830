"""x · weightᵀ of bfloat16 rows and packed weights: codes of 4 or 8 bits with scales a group, tables, or float8.

A tile of 16 outputs is unpacked to bfloat16 in scratch memory that stays in the cache, then multiplied by the blocks of
`dot`, all rows at once: weights are read from memory once, in their packed form.
Traffic: O · I · bits / 8 bytes of codes and a scale (and zero) a group. One stream is bound by the unpacking, some nine
instructions for 32 weights of 4 bits (a register holds all that a code can mean); many rows by the multipliers.
Invariant: a weight becomes the bfloat16 nearest to its float32 value as `quantized_matmul.weights` spells it; a row's
result is made by the same additions in the same order whatever the other rows are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from kernels_pallas.native import dot, kinds
from kernels_pallas.native.lane_blocks import TILE
from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, stored
from kernels_pallas.native.vectors import broadcast, indices, number

WORDS = [(name, "ptr") for name in ("x", "code", "scale", "extra", "out")]
WORDS += [(name, "i64") for name in ("T", "O", "I", "G", "C", "E", "tiles", "parts", "span")]
TURN = 32           # codes unpacked at once, of 4 bits; of 8 bits half as many
TABLE = 16          # values of a table

DECLARATIONS = """
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One spelling of packed weights.

    Attributes:
      code: "int4", "int8", "lut4" or "fp8".
      extra: what stands beside the scales: "zero" (uint8), "offset" (like the scales), "table" or "none".
      scale: "f16" or "f32".
    """

    code: str
    extra: str
    scale: str

    @property
    def name(self) -> str:
        return f"jaxserve_dot_{self.code}_{self.extra}_{self.scale}"

    @property
    def bits(self) -> int:
        return 4 if self.code in ("int4", "lut4") else 8


VARIANTS = (
    *(
        Variant(code=code, extra=extra, scale=scale)
        for code, extra, scale in itertools.product(("int4", "int8"), ("zero", "offset"), ("f16", "f32"))
    ),
    Variant(code="lut4", extra="table", scale="f32"),
    Variant(code="fp8", extra="none", scale="f32"),
)


def shared() -> str:
    """IR that all variants share, beside `dot.products` of bfloat16."""
    return DECLARATIONS


def variant(spelling: Variant) -> str:
    """IR of one variant's unpacking, chunk and setup."""
    ends = dot.begin_and_end(spelling.name, WORDS, kinds.BFLOAT16)
    return "\n".join((_unpack(spelling), _chunk(spelling), _setup(spelling), ends))


def _float(name: str, at: str, scale: str) -> str:
    """IR that loads a scale's type as float32."""
    if scale == "f32":
        return f"  %{name} = load float, ptr {at}, align 4"
    return f"  %{name}_half = load half, ptr {at}, align 2\n  %{name} = fpext half %{name}_half to float"


def _group(spelling: Variant) -> str:
    """What is the same for a group: its scale and what is beside it in every lane; of 4-bit codes, all 16 weights."""
    kind = "half" if spelling.scale == "f16" else "float"
    lines = [
        f"  %scale_at = getelementptr {kind}, ptr %scale, i64 %item",
        _float("scale_one", "%scale_at", spelling.scale), broadcast("scale_v", "%scale_one"),
    ]
    if spelling.extra == "zero":
        lines += [
            "  %zero_at = getelementptr i8, ptr %extra, i64 %item", "  %zero_byte = load i8, ptr %zero_at",
            "  %zero_one = uitofp i8 %zero_byte to float", broadcast("zero_v", "%zero_one"),
        ]
    elif spelling.extra == "offset":
        lines += [
            f"  %offset_at = getelementptr {kind}, ptr %extra, i64 %item",
            _float("offset_one", "%offset_at", spelling.scale), broadcast("offset_v", "%offset_one"),
        ]
    if spelling.bits == 4:
        each = ", ".join(f"float {number(code)}" for code in range(TABLE))
        codes = "%table_v" if spelling.extra == "table" else f"<{each}>"
        lines += [
            _weights(spelling, "weights", codes),
            "  %weights_16 = fptrunc <16 x float> %weights to <16 x bfloat>",
            "  %weights_bits = bitcast <16 x bfloat> %weights_16 to <16 x i16>",
            "  %weights_v = shufflevector <16 x i16> %weights_bits, <16 x i16> poison, "
            + indices([*range(TABLE), *range(TABLE)]),
        ]
    return "\n".join(lines)


def _weights(spelling: Variant, name: str, codes: str) -> str:
    """IR of %name, the weights that 16 codes (as floats) stand for."""
    if spelling.extra == "zero":
        return f"""
  %{name}_value = fsub <16 x float> {codes}, %zero_v
  %{name} = fmul <16 x float> %{name}_value, %scale_v"""
    if spelling.extra == "offset":
        return f"""
  %{name}_scaled = fmul <16 x float> {codes}, %scale_v
  %{name} = fadd <16 x float> %{name}_scaled, %offset_v"""
    return f"  %{name} = fmul <16 x float> {codes}, %scale_v"


def _turn(spelling: Variant) -> str:
    """One turn: codes of the inputs from %i on to bfloat16."""
    if spelling.bits == 4:
        return f"""
  %byte = lshr i64 %i, 1
  %codes_at = getelementptr i8, ptr %row_code, i64 %byte
  %codes = load <16 x i8>, ptr %codes_at, align 1
  %codes_low = and <16 x i8> %codes, splat (i8 15)
  %codes_high = lshr <16 x i8> %codes, splat (i8 4)
  %codes_all = shufflevector <16 x i8> %codes_low, <16 x i8> %codes_high, {indices(list(range(TURN)))}
  %codes_wide = zext <32 x i8> %codes_all to <32 x i16>
  %found = call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> %weights_v, <32 x i16> %codes_wide)
  %to = getelementptr i16, ptr %scratch, i64 %i
  store <32 x i16> %found, ptr %to, align 2
"""
    if spelling.code == "fp8":
        # As float16 the same bits mean 2^-8 of the value; numbers too small for a normal float16 come out right, too.
        floats = """
  %wide = zext <16 x i8> %codes to <16 x i16>
  %sign = and <16 x i16> %wide, splat (i16 128)
  %sign_high = shl <16 x i16> %sign, splat (i16 8)
  %size = and <16 x i16> %wide, splat (i16 127)
  %size_high = shl <16 x i16> %size, splat (i16 7)
  %half_bits = or <16 x i16> %sign_high, %size_high
  %half = bitcast <16 x i16> %half_bits to <16 x half>
  %small = fpext <16 x half> %half to <16 x float>
  %floats = fmul <16 x float> %small, splat (float 256.0)"""
    else:
        floats = """
  %wide = zext <16 x i8> %codes to <16 x i32>
  %floats = uitofp <16 x i32> %wide to <16 x float>"""
    return f"""
  %codes_at = getelementptr i8, ptr %row_code, i64 %i
  %codes = load <16 x i8>, ptr %codes_at, align 1
{floats}
{_weights(spelling, "weights", "%floats")}
  %packed = fptrunc <16 x float> %weights to <16 x bfloat>
  %to = getelementptr bfloat, ptr %scratch, i64 %i
  store <16 x bfloat> %packed, ptr %to, align 2
"""


def _unpack(spelling: Variant) -> str:
    """@NAME_unpack: a row of weights, `row` being its number, to bfloat16."""
    table = ""
    if spelling.extra == "table":       # one a row, or one for all: E is how many there are
        table = f"""
  %own = icmp sgt i64 %E, 1
  %table_row = select i1 %own, i64 %row, i64 0
  %table_item = mul i64 %table_row, {TABLE}
  %table_at = getelementptr float, ptr %extra, i64 %table_item
  %table_v = load <16 x float>, ptr %table_at, align 4
"""
    turn = TURN if spelling.bits == 4 else TURN // 2
    return f"""
define internal void @{spelling.name}_unpack(
  ptr noalias %code, ptr noalias %scale, ptr noalias %extra, ptr noalias %scratch,
  i64 %I, i64 %G, i64 %C, i64 %E, i64 %row
) noinline {{
entry:
  %row_byte = mul i64 %row, %C
  %row_code = getelementptr i8, ptr %code, i64 %row_byte
  %row_item = mul i64 %row, %G
  %group_size = udiv i64 %I, %G
{table}
  br label %begin_group
begin_group:
  %g = phi i64 [0, %entry], [%g_next, %group_end]
  %item = add i64 %row_item, %g
{_group(spelling)}
  %first = mul i64 %g, %group_size
  %stop = add i64 %first, %group_size
  br label %turn
turn:
  %i = phi i64 [%first, %begin_group], [%i_next, %turn]
{_turn(spelling)}
  %i_next = add i64 %i, {turn}
  %again = icmp slt i64 %i_next, %stop
  br i1 %again, label %turn, label %group_end
group_end:
  %g_next = add i64 %g, 1
  %more = icmp slt i64 %g_next, %G
  br i1 %more, label %begin_group, label %exit
exit:
  ret void
}}
"""


def _chunk(spelling: Variant) -> str:
    """@NAME_chunk: tile by tile, 16 rows of weights are unpacked, then met by all rows of x."""
    return f"""
define internal void @{spelling.name}_chunk(ptr %operands, i64 %chunk, ptr %own) {{
entry:
{dot.chunk_operands(WORDS)}
{dot.share(kinds.BFLOAT16, TILE)}
  %out = getelementptr float, ptr %out_all, i64 0       ; one span: every other would unpack all weights again
  %end = call i64 @llvm.smin.i64(i64 %end_whole, i64 %O)
  %row_bytes = mul i64 %I, 2
  %scratch_bytes = mul i64 %row_bytes, {TILE}
  %scratch = call ptr @malloc(i64 %scratch_bytes)
  %tile_last = sub i64 %O, {TILE}
  br label %begin_tile
begin_tile:
  %tile = phi i64 [%begin, %entry], [%tile_next, %next]
  %tile_next = add i64 %tile, {TILE}
  %tile_end = call i64 @llvm.smin.i64(i64 %tile_next, i64 %end)
  %tile_at = call i64 @llvm.smin.i64(i64 %tile, i64 %tile_last)     ; blocks at the edge are moved back
  br label %unpack
unpack:
  %r = phi i64 [0, %begin_tile], [%r_next, %unpack]
  %weight_row = add i64 %tile_at, %r
  %r_byte = mul i64 %r, %row_bytes
  %to = getelementptr i8, ptr %scratch, i64 %r_byte
  call void @{spelling.name}_unpack(
    ptr %code, ptr %scale, ptr %extra, ptr %to, i64 %I, i64 %G, i64 %C, i64 %E, i64 %weight_row
  )
  %r_next = add i64 %r, 1
  %more_rows = icmp slt i64 %r_next, {TILE}
  br i1 %more_rows, label %unpack, label %multiply
multiply:                                       ; the products count outputs from the first of all
  %before = mul i64 %tile_at, %row_bytes
  %back = sub i64 0, %before
  %weight = getelementptr i8, ptr %scratch, i64 %back
  call void @{kinds.BFLOAT16.name}_any(ptr %x, ptr %weight, ptr %out, i64 %T, i64 %O, i64 %I, i64 %tile, i64 %tile_end)
  br label %next
next:
  %more_tiles = icmp slt i64 %tile_next, %end
  br i1 %more_tiles, label %begin_tile, label %exit
exit:
  call void @free(ptr %scratch)
  ret void
}}
"""


def _setup(spelling: Variant) -> str:
    """@NAME_setup: arguments are x [T, I], codes [O, C], scales [O, G], then what is beside them."""
    arguments = ["x", "code", "scale"] + (["extra"] if spelling.extra != "none" else [])
    buffers = "\n".join(
        f"  %{name}_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 {index})\n"
        f"  %{name} = call ptr @data(ptr %{name}_buffer)"
        for index, name in enumerate(arguments)
    )
    if spelling.extra == "none":
        buffers += "\n  %extra = getelementptr i8, ptr null, i64 0\n  %E = add i64 0, 0"
    else:
        buffers += "\n  %E = call i64 @size(ptr %extra_buffer, i64 0)"
    return f"""
define internal i64 @{spelling.name}_setup(ptr %operands, ptr %frame) {{
{buffers}
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %out = call ptr @data(ptr %out_buffer)
  %T_all = call i64 @size(ptr %x_buffer, i64 0)
  %I = call i64 @size(ptr %x_buffer, i64 1)
  %O = call i64 @size(ptr %code_buffer, i64 0)
  %out_bytes = mul i64 %O, 4
  %T = call i64 @{kinds.BFLOAT16.name}_rows(ptr %x, ptr %out, i64 %T_all, i64 %I, i64 %out_bytes)
  %C = call i64 @size(ptr %code_buffer, i64 1)
  %G = call i64 @size(ptr %scale_buffer, i64 1)
{dot.shares(kinds.BFLOAT16, TILE, "%O", has_tiles=False)}
{stored(WORDS)}
  ret i64 %chunks
}}
"""
