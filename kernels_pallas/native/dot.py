"""x · weightᵀ: x [T, I], weight [O, I] as checkpoints store it, out [T, O]; bfloat16 to float32 (ROUNDED: to bfloat16,
once, at the end), or int8 to int32.

By tile registers (`tiles`) where this CPU has them and rows are whole steps of them, else by lanes (`lane_blocks`).
Chunk: a part of the outputs for a span of tokens; by lanes that is all of them, so that weights are read from memory
once, and rows stay in the caches.
Rows of zeros at the end, which is what padding is, are not multiplied: their results are zeros, too.
Traffic: O · I weights, 2 bytes or 1; bound by memory up to some 16 rows, by the multipliers beyond.
Invariant: a row's result is made by the same additions in the same order whatever the other rows are, and however many.
"""

from __future__ import annotations

from kernels_pallas.native import tiles
from kernels_pallas.native.kinds import Numbers
from kernels_pallas.native.lane_blocks import BLOCKS, lane_blocks
from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, loaded, stored

UNIT = tiles.UNIT       # outputs that a chunk has multiples of
PARTS_MAX = 32          # of the outputs, for one span of tokens: a thread that is late leaves its share to others
SPAN_BYTES = 1 << 20    # of x in tiles: half of an L2 cache, so that what is read for all outputs stays there

WORDS = [(name, "ptr") for name in ("x", "weight", "out")]      # operands, in order
WORDS += [(name, "i64") for name in ("T", "O", "I", "tiles", "parts", "span")]
TILES = tiles.ARGUMENTS


def kernel(numbers: Numbers, *, has_tiles: bool) -> str:
    """IR of the chunk, the setup and what a thread has of its own; needs `products`."""
    parts = [_chunk(numbers), _setup(numbers, has_tiles=has_tiles), begin_and_end(numbers.name, WORDS, numbers)]
    return "\n".join(parts)


def products(numbers: Numbers, *, has_tiles: bool) -> str:
    """IR of @NAME_any(x, weight, out, T, O, I, first output, end), of what gives it its x, and of @NAME_rows.

    Args:
      has_tiles: whether rows of whole steps go through tile registers; needs `tiles.shared`.
    """
    parts = [lane_blocks(numbers)]
    if has_tiles:
        parts.append(tiles.products(numbers.name, numbers.tiles, rounds=numbers.out != numbers.sum))
    parts += [_any(numbers, has_tiles=has_tiles), _own(numbers, has_tiles=has_tiles), _rows(numbers)]
    return "\n".join([numbers.declarations, *parts])


def _rows(numbers: Numbers) -> str:
    """@NAME_rows: how many rows x has without those of zeros at its end (one at least); it clears the results of those.

    `out_bytes` are those of a row of results. Where rows are no whole cache lines it does not look.
    """
    line = f"<8 x i64> splat (i64 {numbers.magnitude})"
    return f"""
define internal i64 @{numbers.name}_rows(ptr %x, ptr %out, i64 %T, i64 %I, i64 %out_bytes) noinline {{
entry:
  %row_bytes = mul i64 %I, {numbers.bytes}
  %odd = and i64 %row_bytes, 63
  %is_odd = icmp ne i64 %odd, 0
  %all_bytes = mul i64 %row_bytes, %T
  br i1 %is_odd, label %all, label %line
all:
  ret i64 %T
line:
  %end = phi i64 [%all_bytes, %entry], [%at, %zeros]
  %at = sub i64 %end, 64
  %is_first = icmp slt i64 %at, %row_bytes
  br i1 %is_first, label %found, label %look
look:
  %line_at = getelementptr i8, ptr %x, i64 %at
  %bits = load <8 x i64>, ptr %line_at, align 8
  %sizes = and <8 x i64> %bits, {line.removeprefix("<8 x i64> ")}
  %any = call i64 @llvm.vector.reduce.or.v8i64(<8 x i64> %sizes)
  %is_zero = icmp eq i64 %any, 0
  br i1 %is_zero, label %zeros, label %found
zeros:
  br label %line
found:
  %last = udiv i64 %at, %row_bytes
  %rows = add i64 %last, 1
  %cleared = sub i64 %T, %rows
  %clear_bytes = mul i64 %cleared, %out_bytes
  %clear_item = mul i64 %rows, %out_bytes
  %clear_at = getelementptr i8, ptr %out, i64 %clear_item
  call void @llvm.memset.p0.i64(ptr %clear_at, i8 0, i64 %clear_bytes, i1 false)
  ret i64 %rows
}}
"""


def _any(numbers: Numbers, *, has_tiles: bool) -> str:
    """@NAME_any(TILES): by the form that these sizes take, x being the thread's own."""
    calls = "\n".join(
        f"case{rows}:\n  call void @{numbers.name}_{rows}x{outs}({TILES})\n  ret void"
        for rows, outs in BLOCKS
    )
    by_tiles = f"""{is_whole(numbers)}
  br i1 %is_whole, label %by_tiles, label %by_lanes
by_tiles:
  call void @{numbers.name}_tiles({TILES}, i64 %row_bytes)
  ret void"""
    return f"""
define internal void @{numbers.name}_any({TILES}) noinline {{
{by_tiles if has_tiles else "  br label %by_lanes"}
by_lanes:
  %few = icmp slt i64 %T, 4
  br i1 %few, label %some, label %case4
some:
  %one = icmp eq i64 %T, 1
  br i1 %one, label %case1, label %case2
{calls}
}}
"""


def is_whole(numbers: Numbers) -> str:
    """IR of %is_whole: whether rows of %I numbers are whole steps of tiles, and %row_bytes."""
    return f"""  %row_bytes = mul i64 %I, {numbers.bytes}
  %row_odd = and i64 %row_bytes, {tiles.STEP_BYTES - 1}
  %is_whole = icmp eq i64 %row_odd, 0"""


def _own(numbers: Numbers, *, has_tiles: bool) -> str:
    """What a thread has of x, for one span of tokens at a time.

    @NAME_take(I, span) makes room for it, @NAME_fill(own, x, T, I, span, number) gives the rows of a span as @NAME_any
    takes them, and @NAME_leave(own, I) lets go. Tiles are packed by every thread for itself: what another core has
    written is slow to read.
    """
    take, fill, leave = "  ret ptr null", "  br label %as_they_are", "  ret void"
    if has_tiles:
        take = f"""{is_whole(numbers)}
  br i1 %is_whole, label %tiles, label %none
tiles:
{tiles.CONFIGURE}
  %bytes = mul i64 %span, %row_bytes
  %bytes_all = add i64 %bytes, {tiles.STEP_BYTES}
  %own = call ptr @aligned_alloc(i64 64, i64 %bytes_all)
  store i64 -1, ptr %own                        ; the span that it holds
  ret ptr %own
none:
  ret ptr null"""
        fill = f"""  %is_none = icmp eq ptr %own, null
  br i1 %is_none, label %as_they_are, label %tiles
tiles:
  %packed = getelementptr i8, ptr %own, i64 {tiles.STEP_BYTES}
  %held = load i64, ptr %own
  %is_held = icmp eq i64 %held, %number
  br i1 %is_held, label %done, label %pack
pack:
  call void @tile_pack(ptr %rows, ptr %packed, i64 %T, i64 %row_bytes)
  store i64 %number, ptr %own
  br label %done
done:
  ret ptr %packed"""
        leave = f"""  %is_none = icmp eq ptr %own, null
  br i1 %is_none, label %none, label %tiles
tiles:
{tiles.RELEASE}
  call void @free(ptr %own)
  ret void
none:
  ret void"""
    return f"""
define internal ptr @{numbers.name}_take(i64 %I, i64 %span) {{
{take}
}}
define internal ptr @{numbers.name}_fill(ptr %own, ptr %x, i64 %T, i64 %I, i64 %span, i64 %number) {{
  %row_bytes = mul i64 %I, {numbers.bytes}
  %row = mul i64 %span, %number
  %byte = mul i64 %row, %row_bytes
  %rows = getelementptr i8, ptr %x, i64 %byte
{fill}
as_they_are:
  ret ptr %rows
}}
define internal void @{numbers.name}_leave_own(ptr %own) {{
{leave}
}}
"""


def begin_and_end(name: str, words: list[tuple[str, str]], numbers: Numbers) -> str:
    """IR of @NAME_begin and @NAME_end of a kernel with these operands: its threads' own x."""
    return f"""
define internal ptr @{name}_begin(ptr %operands) {{
{loaded(words)}
  %own = call ptr @{numbers.name}_take(i64 %I, i64 %span)
  ret ptr %own
}}
define internal void @{name}_end(ptr %operands, ptr %own) {{
  call void @{numbers.name}_leave_own(ptr %own)
  ret void
}}
"""


def share(numbers: Numbers, unit: int) -> str:
    """IR of what chunk %chunk is: %x of its span, its %T rows from %row on, and units of outputs [%begin, %end_whole).

    Operands are x_all, T_all, I, span, parts, and `tiles`: how many units of outputs there are. Chunks of a span follow
    each other.
    """
    return f"""
  %number = udiv i64 %chunk, %parts
  %part = urem i64 %chunk, %parts
  %row = mul i64 %number, %span
  %T_left = sub i64 %T_all, %row
  %T = call i64 @llvm.smin.i64(i64 %T_left, i64 %span)
  %x = call ptr @{numbers.name}_fill(ptr %own, ptr %x_all, i64 %T, i64 %I, i64 %span, i64 %number)
  %part_next = add i64 %part, 1
  %a = mul i64 %part, %tiles
  %b = mul i64 %part_next, %tiles
  %c = udiv i64 %a, %parts
  %d = udiv i64 %b, %parts
  %begin = mul i64 %c, {unit}
  %end_whole = mul i64 %d, {unit}"""


OF_STEP = {"x": "x_all", "out": "out_all", "T": "T_all"}      # in a chunk, whose own have the short names


def chunk_operands(words: list[tuple[str, str]]) -> str:
    """IR that reads them, those of all rows by the names of OF_STEP."""
    return loaded([(OF_STEP.get(name, name), kind) for name, kind in words])


def shares(numbers: Numbers, unit: int, outputs: str, *, has_tiles: bool) -> str:
    """IR of %tiles, %span, %parts and %chunks of a kernel with `outputs` outputs, for rows %T of %I numbers."""
    spans = f"""{is_whole(numbers)}
  %span_far = udiv i64 {SPAN_BYTES}, %row_bytes
  %span_whole = and i64 %span_far, {-2 * tiles.SIDE}
  %span_some = call i64 @llvm.smax.i64(i64 %span_whole, i64 {2 * tiles.SIDE})
  %span_of_tiles = select i1 %is_whole, i64 %span_some, i64 %T_above
  %span = call i64 @llvm.smin.i64(i64 %span_of_tiles, i64 %T_above)""" if has_tiles else "  %span = add i64 %T_above, 0"
    return f"""
  %T_far = add i64 %T, {tiles.SIDE - 1}
  %T_above = and i64 %T_far, {-tiles.SIDE}
{spans}
  %spans_far = add i64 %T, %span
  %spans_above = sub i64 %spans_far, 1
  %spans = udiv i64 %spans_above, %span
  %above = add i64 {outputs}, {unit - 1}
  %tiles = udiv i64 %above, {unit}
  %parts = call i64 @llvm.smin.i64(i64 %tiles, i64 {PARTS_MAX})
  %chunks = mul i64 %spans, %parts"""


def _chunk(numbers: Numbers) -> str:
    """@NAME_chunk."""
    return f"""
define internal void @{numbers.name}_chunk(ptr %operands, i64 %chunk, ptr %own) {{
{chunk_operands(WORDS)}
{share(numbers, UNIT)}
  %end = call i64 @llvm.smin.i64(i64 %end_whole, i64 %O)
  %out_item = mul i64 %row, %O
  %out = getelementptr {numbers.out}, ptr %out_all, i64 %out_item
  call void @{numbers.name}_any({TILES})
  ret void
}}
"""


def _setup(numbers: Numbers, *, has_tiles: bool) -> str:
    """@NAME_setup: fills the operands from the frame; how many chunks there are."""
    return f"""
define internal i64 @{numbers.name}_setup(ptr %operands, ptr %frame) {{
  %x_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 0)
  %weight_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 1)
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %x = call ptr @data(ptr %x_buffer)
  %weight = call ptr @data(ptr %weight_buffer)
  %out = call ptr @data(ptr %out_buffer)
  %T_all = call i64 @size(ptr %x_buffer, i64 0)
  %I = call i64 @size(ptr %x_buffer, i64 1)
  %O = call i64 @size(ptr %weight_buffer, i64 0)
  %out_bytes = mul i64 %O, {numbers.out_bytes}
  %T = call i64 @{numbers.name}_rows(ptr %x, ptr %out, i64 %T_all, i64 %I, i64 %out_bytes)
{shares(numbers, UNIT, "%O", has_tiles=has_tiles)}
{stored(WORDS)}
  ret i64 %chunks
}}
"""
