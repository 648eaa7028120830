"""x · weightᵀ by 512-bit registers, block by block: for `dot` without tile registers, or where rows do not fit.

A block is 16 sums, (rows x outputs) of 1 x 16, 2 x 8 or 4 x 4, each 16 lanes wide; a turn of the loop loads a register
of every row and weight row of the block and multiplies them: 32 bfloat16 pairwise (AVX512-BF16 `vdpbf16ps`), 64 int8
four by four (AVX512-VNNI `vpdpbusd`, which takes one side unsigned: weights get 128 more, and who calls takes away 128
times the sum of the row). At the end 15 additions turn the 16 sums of 16 lanes into one register.
Invariant: a row's result is made by the same additions in the same order whatever the other rows are, and however many.
"""

from __future__ import annotations

from kernels_pallas.native import tiles
from kernels_pallas.native.kinds import Numbers
from kernels_pallas.native.vectors import LANES, indices, lane_sums

BLOCKS = ((1, 16), (2, 8), (4, 4))
TILE = 16               # outputs


def lane_blocks(numbers: Numbers) -> str:
    """IR of @NAME_RxO(x, weight, out, T, O, I, first output, end), for all BLOCKS."""
    return "\n".join(_block(numbers, rows, outs) + _tiles(numbers, rows, outs) for rows, outs in BLOCKS)


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
define internal void @{numbers.name}_{rows}x{outs}({tiles.ARGUMENTS}) noinline {{
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
