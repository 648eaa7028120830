"""x · weightᵀ: x [T, I], weight [O, I] as checkpoints store it, out [T, O]; bfloat16 to float32 (ROUNDED: to bfloat16,
once, at the end), or int8 to int32.

By tile registers (`tiles`) where this CPU has them and rows are whole steps of them, else by lanes: a block is 16 sums,
(rows x outputs) of 1 x 16, 2 x 8 or 4 x 4, each 16 lanes wide; a turn of the loop loads a register of every row and
weight row of the block and multiplies them: 32 bfloat16 pairwise (AVX512-BF16 `vdpbf16ps`), 64 int8 four by four
(AVX512-VNNI `vpdpbusd`, which takes one side unsigned: weights get 128 more, and who calls takes away 128 times the sum
of the row). At the end 15 additions turn the 16 sums of 16 lanes into one register.
Chunk: a part of the outputs for a span of tokens; by lanes that is all of them, so that weights are read from memory
once, and rows stay in the caches.
Rows of zeros at the end, which is what padding is, are not multiplied: their results are zeros, too.
Traffic: O · I weights, 2 bytes or 1; bound by memory up to some 16 rows, by the multipliers beyond.
Invariant: a row's result is made by the same additions in the same order whatever the other rows are, and however many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kernels_pallas.native import tiles
from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, loaded, stored
from kernels_pallas.native.vectors import LANES, PAIRS, dot_pairs, indices, lane_sums

BLOCKS = ((1, 16), (2, 8), (4, 4))
TILE = 16               # outputs
UNIT = tiles.UNIT       # outputs that a chunk has multiples of
PARTS_MAX = 32          # of the outputs, for one span of tokens: a thread that is late leaves its share to others
SPAN_BYTES = 1 << 20    # of x in tiles: half of an L2 cache, so that what is read for all outputs stays there

WORDS = [(name, "ptr") for name in ("x", "weight", "out")]      # operands, in order
WORDS += [(name, "i64") for name in ("T", "O", "I", "tiles", "parts", "span")]
TILES = tiles.ARGUMENTS

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


def kernel(numbers: Numbers, *, has_tiles: bool) -> str:
    """IR of the chunk, the setup and what a thread has of its own; needs `products`."""
    parts = [_chunk(numbers), _setup(numbers, has_tiles=has_tiles), begin_and_end(numbers.name, WORDS, numbers)]
    return "\n".join(parts)


def products(numbers: Numbers, *, has_tiles: bool) -> str:
    """IR of @NAME_any(x, weight, out, T, O, I, first output, end), of what gives it its x, and of @NAME_rows.

    Args:
      has_tiles: whether rows of whole steps go through tile registers; needs `tiles.shared`.
    """
    parts = [_block(numbers, rows, outs) + _tiles(numbers, rows, outs) for rows, outs in BLOCKS]
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


def _pointers(numbers: Numbers, kind: str, count: int) -> str:
    """Where the block's rows (or weight rows) begin; `%m0`, `%o0` are the first."""
    return "\n".join(
        f"  %{kind}{i} = add i64 %{kind}0_first, {i}\n"
        f"  %{kind}{i}_item = mul i64 %{kind}{i}, %I\n"
        f"  %{kind}{i}_at = getelementptr {numbers.bits}, ptr %{kind}_data, i64 %{kind}{i}_item"
        for i in range(count)
    )


def _products(numbers: Numbers, rows: int, outs: int, sums: str, into: str, suffix: str) -> str:
    return "\n".join(
        f"  %{into}{m * outs + o} = " + numbers.multiply(f"%{sums}{m * outs + o}", f"%m{m}{suffix}", f"%o{o}{suffix}")
        for o in range(outs) for m in range(rows)
    )


def _loads(numbers: Numbers, rows: int, outs: int) -> tuple[str, str]:
    """A turn's numbers, while the next tile is asked for; and the last, fewer than a register holds."""
    operands = [f"m{m}" for m in range(rows)] + [f"o{o}" for o in range(outs)]
    lanes = f"<{64 // (4 if numbers.item == 'i32' else 2)} x {numbers.item}>"
    bits = f"<{numbers.count} x {numbers.bits}>"

    def seen(name: str, suffix: str) -> tuple[str, str]:
        """The name a register is loaded under, and what makes it the operand."""
        is_made = bool(numbers.weight) and name.startswith("o")
        operand = f"{name}{suffix}"
        return (f"{operand}_in", "\n" + numbers.weight.format(operand)) if is_made else (operand, "")

    loads, rest_loads = [], []
    for name in operands:
        into, made = seen(name, "_v")
        loads.append(
            f"  %{name}_now = getelementptr {numbers.bits}, ptr %{name}_at, i64 %i\n"
            f"  %{into} = load {lanes}, ptr %{name}_now, align {numbers.bytes}{made}"
        )
        into, made = seen(name, "_r")
        rest_loads.append(
            f"  %{name}_end = getelementptr {numbers.bits}, ptr %{name}_at, i64 %whole\n"
            f"  %{name}_bits = call {bits} @llvm.masked.load.v{numbers.count}{numbers.bits}.p0("
            f"ptr %{name}_end, i32 {numbers.bytes}, <{numbers.count} x i1> %mask, {bits} zeroinitializer)\n"
            f"  %{into} = bitcast {bits} %{name}_bits to {lanes}{made}"
        )
    loads += [
        f"  %ahead{o} = getelementptr i8, ptr %o{o}_now, i64 %ahead\n"
        f"  call void @llvm.prefetch.p0(ptr %ahead{o}, i32 0, i32 2, i32 1)" for o in range(outs)
    ]
    return "\n".join(loads), "\n".join(rest_loads)


def _block(numbers: Numbers, rows: int, outs: int) -> str:
    """@NAME_block_RxO(x, weight, out, O, I, first row, first output, what to prefetch): 16 sums over all of I."""
    loads, rest_loads = _loads(numbers, rows, outs)
    each, sums, counts = range(LANES), f"<16 x {numbers.sum}>", f"<{numbers.count} x i32>"
    adding, total = lane_sums([f"%whole_sum{i}" for i in each], kind=numbers.sum)
    stores = "\n".join(
        f"  %out{m}_v = shufflevector {sums} {total}, {sums} poison, "
        f"{indices(list(range(m * outs, (m + 1) * outs)))}\n"
        f"  %out{m}_row = mul i64 %m{m}, %O\n"
        f"  %out{m}_item = add i64 %out{m}_row, %o0_first\n"
        f"  %out{m}_at = getelementptr {numbers.out}, ptr %out, i64 %out{m}_item\n" + (
            f"  store <{outs} x {numbers.sum}> %out{m}_v, ptr %out{m}_at, align 4" if numbers.out == numbers.sum else
            f"  %out{m}_short = fptrunc <{outs} x float> %out{m}_v to <{outs} x bfloat>\n"
            f"  store <{outs} x bfloat> %out{m}_short, ptr %out{m}_at, align 2"
        ) for m in range(rows)
    )
    return f"""
define internal void @{numbers.name}_block_{rows}x{outs}(
  ptr noalias %m_data, ptr noalias %o_data, ptr noalias %out,
  i64 %O, i64 %I, i64 %m0_first, i64 %o0_first, i64 %ahead
) alwaysinline {{
entry:
{_pointers(numbers, "m", rows)}
{_pointers(numbers, "o", outs)}
  %whole = and i64 %I, {-numbers.count}
  %some = icmp sgt i64 %whole, 0
  br i1 %some, label %turn, label %end
turn:
  %i = phi i64 [0, %entry], [%i_next, %turn]
{chr(10).join(f"  %sum{i} = phi {sums} [zeroinitializer, %entry], [%more{i}, %turn]" for i in each)}
{loads}
{_products(numbers, rows, outs, "sum", "more", "_v")}
  %i_next = add i64 %i, {numbers.count}
  %again = icmp slt i64 %i_next, %whole
  br i1 %again, label %turn, label %end
end:
{chr(10).join(f"  %so_far{i} = phi {sums} [zeroinitializer, %entry], [%more{i}, %turn]" for i in each)}
  %rest = sub i64 %I, %whole
  %none = icmp eq i64 %rest, 0
  br i1 %none, label %add, label %last
last:
  %rest_short = trunc i64 %rest to i32
  %rest_lane = insertelement {counts} poison, i32 %rest_short, i64 0
  %rest_lanes = shufflevector {counts} %rest_lane, {counts} poison, {counts} zeroinitializer
  %mask = icmp ult {indices(list(range(numbers.count)))}, %rest_lanes
{rest_loads}
{_products(numbers, rows, outs, "so_far", "with_rest", "_r")}
  br label %add
add:
{chr(10).join(f"  %whole_sum{i} = phi {sums} [%so_far{i}, %end], [%with_rest{i}, %last]" for i in each)}
{adding}
{stores}
  ret void
}}
"""


def _tiles(numbers: Numbers, rows: int, outs: int) -> str:
    """@NAME_RxO: all rows of the outputs [begin, end). Blocks at an edge are moved back: they compute some twice."""
    return f"""
define internal void @{numbers.name}_{rows}x{outs}({TILES}) noinline {{
entry:
  %row_last = sub i64 %T, {rows}
  %out_last = sub i64 %O, {outs}
  %tile_bytes = mul i64 %I, {numbers.bytes * TILE}
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
  call void @{numbers.name}_block_{rows}x{outs}(
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
