"""x · weightᵀ of bfloat16 with float32 sums: x [T, I], weight [O, I] as checkpoints store it, out [T, O].

Block: 16 sums, (rows x outputs) of 1 x 16, 2 x 8 or 4 x 4, each 16 lanes wide; a turn of the loop loads 32 numbers of
every row and weight row of the block and multiplies them pairwise (AVX512-BF16 `vdpbf16ps`). At the end 15 additions
turn the 16 sums of 16 lanes into one register. Chunk: tiles of 16 outputs, all rows; weights are read from memory
once, rows stay in the caches.
Traffic: 2 · O · I bytes of weights; bound by memory up to some 16 rows, by the multipliers beyond.
Invariant: a row's result is made by the same additions in the same order whatever the other rows are, and however many.
"""

from __future__ import annotations

from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, loaded, stored
from kernels_pallas.native.vectors import LANES, PAIRS, dot_pairs, indices, lane_sums

NAME = "jaxserve_dot"
BLOCKS = ((1, 16), (2, 8), (4, 4))
TILE = 16               # outputs
CHUNKS_MAX = 32         # of a product: a thread that is late leaves its share to others

WORDS = [(name, "ptr") for name in ("x", "weight", "out")]      # operands, in order
WORDS += [(name, "i64") for name in ("T", "O", "I", "tiles", "chunks")]
TILES = "ptr %x, ptr %weight, ptr %out, i64 %T, i64 %O, i64 %I, i64 %begin, i64 %end"

DECLARATIONS = """
declare <32 x i16> @llvm.masked.load.v32i16.p0(ptr, i32, <32 x i1>, <32 x i16>)
"""


def kernel() -> str:
    """IR of the chunk, the setup, and the blocks."""
    blocks = [_block(rows, outs) + _tiles(rows, outs) for rows, outs in BLOCKS]
    return "\n".join([DECLARATIONS, *blocks, _chunk(), _setup()])


def _pointers(kind: str, count: int) -> str:
    """Where the block's rows (or weight rows) begin; `%m0`, `%o0` are the first."""
    return "\n".join(
        f"  %{kind}{i} = add i64 %{kind}0_first, {i}\n"
        f"  %{kind}{i}_item = mul i64 %{kind}{i}, %I\n"
        f"  %{kind}{i}_at = getelementptr bfloat, ptr %{kind}_data, i64 %{kind}{i}_item"
        for i in range(count)
    )


def _products(rows: int, outs: int, sums: str, into: str, suffix: str) -> str:
    return "\n".join(
        f"  %{into}{m * outs + o} = "
        + dot_pairs(f"<16 x float> %{sums}{m * outs + o}", f"%m{m}{suffix}", f"%o{o}{suffix}")
        for o in range(outs) for m in range(rows)
    )


def _loads(rows: int, outs: int) -> tuple[str, str]:
    """A turn's numbers, while the next tile is asked for; and the last, fewer than a register holds."""
    operands = [f"m{m}" for m in range(rows)] + [f"o{o}" for o in range(outs)]
    loads = [
        f"  %{name}_now = getelementptr bfloat, ptr %{name}_at, i64 %i\n"
        f"  %{name}_v = load <32 x bfloat>, ptr %{name}_now, align 2" for name in operands
    ]
    loads += [
        f"  %ahead{o} = getelementptr i8, ptr %o{o}_now, i64 %ahead\n"
        f"  call void @llvm.prefetch.p0(ptr %ahead{o}, i32 0, i32 2, i32 1)" for o in range(outs)
    ]
    rest_loads = [
        f"  %{name}_end = getelementptr bfloat, ptr %{name}_at, i64 %whole\n"
        f"  %{name}_bits = call <32 x i16> @llvm.masked.load.v32i16.p0("
        f"ptr %{name}_end, i32 2, <32 x i1> %mask, <32 x i16> zeroinitializer)\n"
        f"  %{name}_r = bitcast <32 x i16> %{name}_bits to <32 x bfloat>" for name in operands
    ]
    return "\n".join(loads), "\n".join(rest_loads)


def _block(rows: int, outs: int) -> str:
    """@block_RxO(x, weight, out, O, I, first row, first output, what to prefetch): 16 sums over the whole of I."""
    loads, rest_loads = _loads(rows, outs)
    each = range(LANES)
    adding, total = lane_sums([f"%whole_sum{i}" for i in each])
    stores = "\n".join(
        f"  %out{m}_v = shufflevector <16 x float> {total}, <16 x float> poison, "
        f"{indices(list(range(m * outs, (m + 1) * outs)))}\n"
        f"  %out{m}_row = mul i64 %m{m}, %O\n"
        f"  %out{m}_item = add i64 %out{m}_row, %o0_first\n"
        f"  %out{m}_at = getelementptr float, ptr %out, i64 %out{m}_item\n"
        f"  store <{outs} x float> %out{m}_v, ptr %out{m}_at, align 4" for m in range(rows)
    )
    return f"""
define internal void @block_{rows}x{outs}(
  ptr noalias %m_data, ptr noalias %o_data, ptr noalias %out,
  i64 %O, i64 %I, i64 %m0_first, i64 %o0_first, i64 %ahead
) alwaysinline {{
entry:
{_pointers("m", rows)}
{_pointers("o", outs)}
  %whole = and i64 %I, {-PAIRS}
  %some = icmp sgt i64 %whole, 0
  br i1 %some, label %turn, label %end
turn:
  %i = phi i64 [0, %entry], [%i_next, %turn]
{chr(10).join(f"  %sum{i} = phi <16 x float> [zeroinitializer, %entry], [%more{i}, %turn]" for i in each)}
{loads}
{_products(rows, outs, "sum", "more", "_v")}
  %i_next = add i64 %i, {PAIRS}
  %again = icmp slt i64 %i_next, %whole
  br i1 %again, label %turn, label %end
end:
{chr(10).join(f"  %so_far{i} = phi <16 x float> [zeroinitializer, %entry], [%more{i}, %turn]" for i in each)}
  %rest = sub i64 %I, %whole
  %none = icmp eq i64 %rest, 0
  br i1 %none, label %add, label %last
last:
  %rest_short = trunc i64 %rest to i32
  %rest_lane = insertelement <32 x i32> poison, i32 %rest_short, i64 0
  %rest_lanes = shufflevector <32 x i32> %rest_lane, <32 x i32> poison, <32 x i32> zeroinitializer
  %mask = icmp ult {indices(list(range(PAIRS)))}, %rest_lanes
{rest_loads}
{_products(rows, outs, "so_far", "with_rest", "_r")}
  br label %add
add:
{chr(10).join(f"  %whole_sum{i} = phi <16 x float> [%so_far{i}, %end], [%with_rest{i}, %last]" for i in each)}
{adding}
{stores}
  ret void
}}
"""


def _tiles(rows: int, outs: int) -> str:
    """@tiles_RxO: all rows of the outputs [begin, end). Blocks at an edge are moved back: they compute some twice."""
    return f"""
define internal void @tiles_{rows}x{outs}({TILES}) noinline {{
entry:
  %row_last = sub i64 %T, {rows}
  %out_last = sub i64 %O, {outs}
  %tile_bytes = mul i64 %I, {2 * TILE}
  br label %tile
tile:
  %first = phi i64 [%begin, %entry], [%first_next, %tile_end]
  %first_next = add i64 %first, {TILE}
  %stop = call i64 @llvm.smin.i64(i64 %first_next, i64 %end)
  br label %rows
rows:
  %row = phi i64 [0, %tile], [%row_next, %rows_end]
  %row_at = call i64 @llvm.smin.i64(i64 %row, i64 %row_last)
  br label %outs
outs:
  %o = phi i64 [%first, %rows], [%o_next, %outs]
  %o_at = call i64 @llvm.smin.i64(i64 %o, i64 %out_last)
  call void @block_{rows}x{outs}(
    ptr %x, ptr %weight, ptr %out, i64 %O, i64 %I, i64 %row_at, i64 %o_at, i64 %tile_bytes
  )
  %o_next = add i64 %o, {outs}
  %more_outs = icmp slt i64 %o_next, %stop
  br i1 %more_outs, label %outs, label %rows_end
rows_end:
  %row_next = add i64 %row, {rows}
  %more_rows = icmp slt i64 %row_next, %T
  br i1 %more_rows, label %rows, label %tile_end
tile_end:
  %more_tiles = icmp slt i64 %first_next, %end
  br i1 %more_tiles, label %tile, label %exit
exit:
  ret void
}}
"""


def _chunk() -> str:
    """@NAME_chunk: operands are x, weight, out, T, O, I, tiles, chunks."""
    calls = "\n".join(
        f"case{rows}:\n  call void @tiles_{rows}x{outs}({TILES})\n  ret void"
        for rows, outs in BLOCKS
    )
    return f"""
define internal void @{NAME}_chunk(ptr %operands, i64 %chunk) {{
{loaded(WORDS)}
  %chunk_next = add i64 %chunk, 1
  %a = mul i64 %chunk, %tiles
  %b = mul i64 %chunk_next, %tiles
  %c = udiv i64 %a, %chunks
  %d = udiv i64 %b, %chunks
  %begin = mul i64 %c, {TILE}
  %end_whole = mul i64 %d, {TILE}
  %end = call i64 @llvm.smin.i64(i64 %end_whole, i64 %O)
  %few = icmp slt i64 %T, 4
  br i1 %few, label %some, label %case4
some:
  %one = icmp eq i64 %T, 1
  br i1 %one, label %case1, label %case2
{calls}
}}
"""


def _setup() -> str:
    """@NAME_setup: fills the operands from the frame; how many chunks there are."""
    return f"""
define internal i64 @{NAME}_setup(ptr %operands, ptr %frame) {{
  %x_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 0)
  %weight_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 1)
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %x = call ptr @data(ptr %x_buffer)
  %weight = call ptr @data(ptr %weight_buffer)
  %out = call ptr @data(ptr %out_buffer)
  %T = call i64 @size(ptr %x_buffer, i64 0)
  %I = call i64 @size(ptr %x_buffer, i64 1)
  %O = call i64 @size(ptr %weight_buffer, i64 0)
  %above = add i64 %O, {TILE - 1}
  %tiles = udiv i64 %above, {TILE}
  %chunks = call i64 @llvm.smin.i64(i64 %tiles, i64 {CHUNKS_MAX})
{stored(WORDS)}
  ret i64 %chunks
}}
"""
