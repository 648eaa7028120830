"""act(x · gateᵀ) * (x · upᵀ): x [T, I], weight [2 F, I] with rows of gate, then of up; bfloat16 out [T, F].

Chunk: tiles of 16 outputs; both products of a tile (`dot`) rest in a buffer of T x 2 x 16 float32 in the caches, are
rounded to bfloat16 as a linear layer's results are, and become 16 outputs a row, computed in float32 and rounded once.
act(g) is g · sigmoid(a), a = g (first + third · g²): SiLU by 1 and 0, GELU in its form with tanh by 2 √(2/π) and
0.044715 times that.
Traffic: 2 F · I weights once; without it two float32 results for each that stays would go to memory and back.
Invariant: a row's result is the same beside any others.
"""

from __future__ import annotations

from kernels_pallas.native import dot, kinds, tiles
from kernels_pallas.native.lane_blocks import TILE
from kernels_pallas.native.runtime import RESULT_TABLE, arguments, joined, loop, stored
from kernels_pallas.native.vectors import LANES, LOG2_E, broadcast, splat

NAME = "jaxserve_gated"
VECTOR = "<16 x float>"

WORDS = [(name, "ptr") for name in ("x", "weight", "factors", "out")]
WORDS += [(name, "i64") for name in ("T", "F", "I", "tiles", "parts", "span")]
OUTPUTS = "ptr %x, ptr %gate, ptr %up, ptr %out, i64 %T, i64 %F, i64 %I, i64 %tile, float %first, float %third"


def kernel(*, has_tiles: bool) -> str:
    """IR of the activation, the chunk, the setup and the end; needs `dot.products` of bfloat16 and @power."""
    by_tiles = [_tile(), _by_tiles()] if has_tiles else []
    ends = [_chunk(has_tiles=has_tiles), _setup(has_tiles=has_tiles), dot.begin_and_end(NAME, WORDS, kinds.BFLOAT16)]
    return joined([_activation(), _by_lanes(), *by_tiles, *ends])


def _activation() -> str:
    """@gated_activation: 16 results, not yet rounded, from 16 products of each side."""
    rounded = joined([
        f"  %{name}_short = fptrunc {VECTOR} %{name}_long to <16 x bfloat>\n"
        f"  %{name} = fpext <16 x bfloat> %{name}_short to {VECTOR}" for name in ("gate", "up")
    ])
    return f"""
declare {VECTOR} @llvm.fabs.v16f32({VECTOR})
declare {VECTOR} @llvm.x86.avx512.rcp14.ps.512({VECTOR}, {VECTOR}, i16)
define internal {VECTOR} @gated_activation(
  {VECTOR} %gate_long, {VECTOR} %up_long, {VECTOR} %firsts, {VECTOR} %thirds, i1 %is_straight
) alwaysinline {{
{rounded}
  %square = fmul {VECTOR} %gate, %gate
  %curved = fmul {VECTOR} %square, %thirds
  %steep = fadd {VECTOR} %curved, %firsts
  %factor = select i1 %is_straight, {VECTOR} %firsts, {VECTOR} %steep     ; 0 x infinity would be NaN
  %angle = fmul {VECTOR} %gate, %factor
  %size = call {VECTOR} @llvm.fabs.v16f32({VECTOR} %angle)
  %fall = fmul {VECTOR} %size, {splat(-LOG2_E).removeprefix(VECTOR + " ")}
  %power = call {VECTOR} @power({VECTOR} %fall)
  %divisor = fadd {VECTOR} %power, {splat(1.0).removeprefix(VECTOR + " ")}
  %is_negative = fcmp olt {VECTOR} %angle, zeroinitializer
  %part = select <16 x i1> %is_negative, {VECTOR} %power, {splat(1.0)}
  %guess = call {VECTOR} @llvm.x86.avx512.rcp14.ps.512({VECTOR} %divisor, {VECTOR} zeroinitializer, i16 -1)
  %minus = fneg {VECTOR} %guess
  %error = call {VECTOR} @llvm.fma.v16f32({VECTOR} %minus, {VECTOR} %divisor, {splat(1.0)})
  %inverse = call {VECTOR} @llvm.fma.v16f32({VECTOR} %guess, {VECTOR} %error, {VECTOR} %guess)     ; 2^-28, of 2^-14
  %sigmoid = fmul {VECTOR} %part, %inverse
  %act = fmul {VECTOR} %gate, %sigmoid
  %result = fmul {VECTOR} %act, %up
  ret {VECTOR} %result
}}
"""


def _of_row() -> str:
    """IR of %result from row %row of 16 numbers of %gates and %ups; FACTORS come before."""
    loads = joined([
        f"  %{name}_at = getelementptr {VECTOR}, ptr %{name}s, i64 %row\n"
        f"  %{name}_of_row = load {VECTOR}, ptr %{name}_at, align 4" for name in ("gate", "up")
    ])
    return f"""{loads}
  %result = call {VECTOR} @gated_activation(
    {VECTOR} %gate_of_row, {VECTOR} %up_of_row, {VECTOR} %firsts, {VECTOR} %thirds, i1 %is_straight
  )"""


FACTORS = f"""{broadcast("firsts", "%first")}
{broadcast("thirds", "%third")}
  %is_straight = fcmp oeq float %third, 0.0"""


def _by_lanes() -> str:
    """@gated_by_lanes: 16 outputs from %tile on, of all rows; their products rest in %gates and %ups, [T, 16] each."""
    products = joined([
        f"  call void @{kinds.BFLOAT16.name}_any(ptr %x, ptr %{name}, ptr %{name}s, i64 %T, i64 {TILE}, i64 %I, "
        f"i64 0, i64 {TILE})" for name in ("gate", "up")
    ])
    body = f"""{_of_row()}
  %result_short = fptrunc {VECTOR} %result to <16 x bfloat>
  %out_row = mul i64 %row, %F
  %out_item = add i64 %out_row, %tile
  %to = getelementptr bfloat, ptr %out, i64 %out_item
  store <16 x bfloat> %result_short, ptr %to, align 2"""
    return f"""
define internal void @gated_by_lanes({OUTPUTS}) noinline {{
entry:
  %side_items = mul i64 %T, {TILE}
  %gates_bytes = mul i64 %side_items, 8
  %gates = call ptr @malloc(i64 %gates_bytes)
  %ups = getelementptr float, ptr %gates, i64 %side_items
{products}
{FACTORS}
{loop("row", "0", "%T", 1, body, "entry")}
  call void @free(ptr %gates)
  ret void
}}
"""


def _tile() -> str:
    """@gated_tile: 16 outputs of 16 tokens from %token on; their products are [outputs, tokens] in %gates and %ups."""
    body = f"""{_of_row()}
  %result_at = getelementptr {VECTOR}, ptr %results, i64 %row
  store {VECTOR} %result, ptr %result_at, align 64"""
    return f"""
define internal void @gated_tile(
  ptr %gates, ptr %ups, ptr %out, i64 %T, i64 %F, i64 %token, i64 %tile, float %first, float %third
) noinline {{
entry:
  %results = alloca [{LANES} x {VECTOR}], align 64
{FACTORS}
{loop("row", "0", str(LANES), 1, body, "entry")}
  %out_bytes = mul i64 %F, 2
  %byte = mul i64 %tile, 2
  call void @tile_store_rounded(ptr %results, ptr %out, i64 %T, i64 %out_bytes, i64 %token, i64 %byte)
  ret void
}}
"""


def _by_tiles() -> str:
    """@gated_by_tiles: 16 outputs from %tile on, of all rows; the thread's tiles are configured before."""

    def stores(tokens: int) -> str:
        lines = [f"  %far{tokens} = add i64 %token2, {tiles.SIDE}"]
        for t in range(tokens):
            for side, name in enumerate(("gates", "ups")):
                at = tiles.TILE_BYTES * (side * tokens + t)
                lines.append(f"  %{name}{tokens}_{t} = getelementptr i8, ptr %sums2, i64 {at}")
            lines.append(
                f"  call void @gated_tile(ptr %gates{tokens}_{t}, ptr %ups{tokens}_{t}, ptr %out, i64 %T, i64 %F, "
                f"i64 %{f'far{tokens}' if t else 'token2'}, i64 %tile, float %first, float %third)"
            )
        return joined(lines)

    return f"""
define internal void @gated_by_tiles({OUTPUTS}, i64 %row_bytes) noinline {{
entry:
  %weight0 = getelementptr i8, ptr %gate, i64 0
  %weight1 = getelementptr i8, ptr %up, i64 0
{tiles.SLABS}
{tiles.over_tokens(tiles.BFLOAT16, 2, stores, "entry")}
  call void @free(ptr %sums_all)
  ret void
}}
"""


def _chunk(*, has_tiles: bool) -> str:
    """@NAME_chunk: 16 outputs by 16, two products and what becomes of them."""
    begin, each = "", f"  call void @gated_by_lanes({OUTPUTS})"
    if has_tiles:
        begin = dot.is_whole(kinds.BFLOAT16)
        each = f"""  br i1 %is_whole, label %by_tiles, label %by_lanes
by_tiles:
  call void @gated_by_tiles({OUTPUTS}, i64 %row_bytes)
  br label %stored
by_lanes:
  call void @gated_by_lanes({OUTPUTS})
  br label %stored
stored:"""
    body = f"""  %tile = call i64 @llvm.smin.i64(i64 %outputs, i64 %tile_last)     ; the last one is moved back
  %gate_item = mul i64 %tile, %I
  %gate = getelementptr bfloat, ptr %weight, i64 %gate_item
  %up_row = add i64 %tile, %F
  %up_item = mul i64 %up_row, %I
  %up = getelementptr bfloat, ptr %weight, i64 %up_item
{each}"""
    return f"""
define internal void @{NAME}_chunk(ptr %operands, i64 %chunk, ptr %own) {{
{dot.chunk_operands(WORDS)}
{dot.share(kinds.BFLOAT16, dot.UNIT)}
  %end = call i64 @llvm.smin.i64(i64 %end_whole, i64 %F)
  %out_item_first = mul i64 %row, %F
  %out = getelementptr bfloat, ptr %out_all, i64 %out_item_first
  %first_at = getelementptr float, ptr %factors, i64 0
  %third_at = getelementptr float, ptr %factors, i64 1
  %first = load float, ptr %first_at
  %third = load float, ptr %third_at
  %tile_last = sub i64 %F, {TILE}
{begin}
  br label %begin_each
begin_each:
{loop("outputs", "%begin", "%end", TILE, body, "begin_each")}
  ret void
}}
"""


def _setup(*, has_tiles: bool) -> str:
    """@NAME_setup: arguments are x, weight, the two factors."""
    return f"""
define internal i64 @{NAME}_setup(ptr %operands, ptr %frame) {{
{arguments(("x", "weight", "factors"))}
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %out = call ptr @data(ptr %out_buffer)
  %T_all = call i64 @size(ptr %x_buffer, i64 0)
  %I = call i64 @size(ptr %x_buffer, i64 1)
  %F = call i64 @size(ptr %out_buffer, i64 1)
  %out_bytes = mul i64 %F, 2
  %T = call i64 @{kinds.BFLOAT16.name}_rows(ptr %x, ptr %out, i64 %T_all, i64 %I, i64 %out_bytes)
{dot.shares(kinds.BFLOAT16, dot.UNIT, "%F", has_tiles=has_tiles)}
{stored(WORDS)}
  ret i64 %chunks
}}
"""
