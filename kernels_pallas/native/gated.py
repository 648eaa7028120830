"""act(x · gateᵀ) * (x · upᵀ): x [T, I], weight [2 F, I] with rows of gate, then of up; bfloat16 out [T, F].

Chunk: tiles of 16 outputs; both products of a tile (`dot`) rest in a buffer of T x 2 x 16 float32 in the caches, are
rounded to bfloat16 as a linear layer's results are, and become 16 outputs a row, computed in float32 and rounded once.
act(g) is g · sigmoid(a), a = g (first + third · g²): SiLU by 1 and 0, GELU in its form with tanh by 2 √(2/π) and
0.044715 times that.
Traffic: 2 F · I weights once; without it two float32 results for each that stays would go to memory and back.
Invariant: a row's result is the same beside any others.
"""

from __future__ import annotations

from kernels_pallas.native import dot
from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, joined, loaded, loop, stored
from kernels_pallas.native.vectors import LANES, LOG2_E, POWER_MIN, broadcast, splat

NAME = "jaxserve_gated"
VECTOR = "<16 x float>"

WORDS = [(name, "ptr") for name in ("x", "weight", "factors", "out")]
WORDS += [(name, "i64") for name in ("T", "F", "I", "tiles", "chunks")]


def kernel() -> str:
    """IR of the activation, the chunk and the setup; needs `dot.products` of bfloat16 and @power."""
    return joined([_activated(), _chunk(), _setup(), dot.finish(NAME, WORDS, dot.BFLOAT16)])


def _activated() -> str:
    """@gated_activated: a tile's 16 outputs of every row, from its products in %gates and %ups, [T, 16] each."""
    rounded = joined([
        f"  %{name}_from = getelementptr float, ptr %{name}s, i64 %item\n"
        f"  %{name}_long = load {VECTOR}, ptr %{name}_from, align 4\n"
        f"  %{name}_short = fptrunc {VECTOR} %{name}_long to <16 x bfloat>\n"
        f"  %{name} = fpext <16 x bfloat> %{name}_short to {VECTOR}" for name in ("gate", "up")
    ])
    body = f"""  %item = mul i64 %row, {LANES}
{rounded}
  %square = fmul {VECTOR} %gate, %gate
  %curved = fmul {VECTOR} %square, %thirds
  %steep = fadd {VECTOR} %curved, %firsts
  %factor = select i1 %is_straight, {VECTOR} %firsts, {VECTOR} %steep     ; 0 x infinity would be NaN
  %angle = fmul {VECTOR} %gate, %factor
  %size = call {VECTOR} @llvm.fabs.v16f32({VECTOR} %angle)
  %fall = fmul {VECTOR} %size, {splat(-LOG2_E).removeprefix(VECTOR + " ")}
  %power = call {VECTOR} @power({VECTOR} %fall)
  %is_nothing = fcmp ole {VECTOR} %fall, {splat(POWER_MIN).removeprefix(VECTOR + " ")}
  %fallen = select <16 x i1> %is_nothing, {VECTOR} zeroinitializer, {VECTOR} %power     ; times a gate of -1e38
  %divisor = fadd {VECTOR} %power, {splat(1.0).removeprefix(VECTOR + " ")}
  %is_negative = fcmp olt {VECTOR} %angle, zeroinitializer
  %part = select <16 x i1> %is_negative, {VECTOR} %fallen, {splat(1.0)}
  %sigmoid = fdiv {VECTOR} %part, %divisor
  %act = fmul {VECTOR} %gate, %sigmoid
  %result = fmul {VECTOR} %act, %up
  %result_short = fptrunc {VECTOR} %result to <16 x bfloat>
  %out_row = mul i64 %row, %F
  %out_item = add i64 %out_row, %tile
  %to = getelementptr bfloat, ptr %out, i64 %out_item
  store <16 x bfloat> %result_short, ptr %to, align 2"""
    return f"""
declare {VECTOR} @llvm.fabs.v16f32({VECTOR})
define internal void @gated_activated(
  ptr noalias %gates, ptr noalias %ups, ptr noalias %out, i64 %T, i64 %F, i64 %tile, float %first, float %third
) noinline {{
entry:
{broadcast("firsts", "%first")}
{broadcast("thirds", "%third")}
  %is_straight = fcmp oeq float %third, 0.0
{loop("row", "0", "%T", 1, body, "entry")}
  ret void
}}
"""


def _chunk() -> str:
    """@NAME_chunk: tile by tile, two products and what becomes of them."""
    products = joined([
        f"  call void @{dot.BFLOAT16.name}_any(ptr %x, ptr %{name}, ptr %{name}s, i64 %T, i64 {dot.TILE}, i64 %I, i64 0, "
        f"i64 {dot.TILE})" for name in ("gate", "up")
    ])
    return f"""
define internal void @{NAME}_chunk(ptr %operands, i64 %chunk) {{
entry:
{loaded(WORDS)}
  %first_at = getelementptr float, ptr %factors, i64 0
  %third_at = getelementptr float, ptr %factors, i64 1
  %first = load float, ptr %first_at
  %third = load float, ptr %third_at
  %chunk_next = add i64 %chunk, 1
  %a = mul i64 %chunk, %tiles
  %b = mul i64 %chunk_next, %tiles
  %c = udiv i64 %a, %chunks
  %d = udiv i64 %b, %chunks
  %begin = mul i64 %c, {dot.TILE}
  %end = mul i64 %d, {dot.TILE}
  %side_items = mul i64 %T, {dot.TILE}
  %gates_bytes = mul i64 %side_items, 8
  %scratch = call ptr @malloc(i64 %gates_bytes)
  %gates = getelementptr float, ptr %scratch, i64 0
  %ups = getelementptr float, ptr %scratch, i64 %side_items
  %tile_last = sub i64 %F, {dot.TILE}
  br label %each
each:
  %tile_whole = phi i64 [%begin, %entry], [%tile_next, %each]
  %tile_next = add i64 %tile_whole, {dot.TILE}
  %tile = call i64 @llvm.smin.i64(i64 %tile_whole, i64 %tile_last)     ; the last one is moved back
  %gate_item = mul i64 %tile, %I
  %gate = getelementptr bfloat, ptr %weight, i64 %gate_item
  %up_row = add i64 %tile, %F
  %up_item = mul i64 %up_row, %I
  %up = getelementptr bfloat, ptr %weight, i64 %up_item
{products}
  call void @gated_activated(ptr %gates, ptr %ups, ptr %out, i64 %T, i64 %F, i64 %tile, float %first, float %third)
  %more = icmp slt i64 %tile_next, %end
  br i1 %more, label %each, label %exit
exit:
  call void @free(ptr %scratch)
  ret void
}}
"""


def _setup() -> str:
    """@NAME_setup: arguments are x, weight, the two factors."""
    arguments = joined([
        f"  %{name}_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 {index})\n"
        f"  %{'x_rows' if name == 'x' else name} = call ptr @data(ptr %{name}_buffer)"
        for index, name in enumerate(("x", "weight", "factors"))
    ])
    return f"""
define internal i64 @{NAME}_setup(ptr %operands, ptr %frame) {{
{arguments}
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %out = call ptr @data(ptr %out_buffer)
  %T_all = call i64 @size(ptr %x_buffer, i64 0)
  %I = call i64 @size(ptr %x_buffer, i64 1)
  %F = call i64 @size(ptr %out_buffer, i64 1)
  %out_bytes = mul i64 %F, 2
  %T = call i64 @{dot.BFLOAT16.name}_rows(ptr %x_rows, ptr %out, i64 %T_all, i64 %I, i64 %out_bytes)
  %x = call ptr @{dot.BFLOAT16.name}_taken(ptr %x_rows, i64 %T, i64 %I)
  %above = add i64 %F, {dot.TILE - 1}
  %tiles = udiv i64 %above, {dot.TILE}
  %chunks = call i64 @llvm.smin.i64(i64 %tiles, i64 {dot.CHUNKS_MAX})
{stored(WORDS)}
  ret i64 %chunks
}}
"""
