"""Scores and weighted sums of a batch of up to 16 queries (`queries`) by tile registers (`tiles`).

The block's buffers lie as tiles want them: a tile of keys is 16 pairs of head dimensions of 16 slots, one of values 16
pairs of slots of 16 head dimensions; a chunk's own queries and sums lie side by side.
Work: 8 multiplications of tiles for 16 queries, 64 slots and 64 dimensions, and as many for values; the weights between
them (`queries`) are most of what is left.
Invariant: a query's numbers do not depend on its batch; rows of a tile that hold no query hold anything, and are not
looked at.
"""

from __future__ import annotations

from kernels_pallas.native import tiles
from kernels_pallas.native.blocks import BLOCK, DIM_STEP
from kernels_pallas.native.queries import BATCH, VECTOR, read
from kernels_pallas.native.runtime import joined, loop
from kernels_pallas.native.tiles import SIDE
from kernels_pallas.native.vectors import LANES, broadcast

SUMS = 4            # tiles of sums at once
OWN, SHARED = 4, 5  # the register of queries or weights, and the first of keys or values


def parts() -> str:
    """IR of @attend_scores_by_tiles and @attend_sums_by_tiles, called as those of `queries` are."""
    return "\n".join([_scores(), _sums()])


def _scores() -> str:
    step = joined([
        "  %own_at = getelementptr bfloat, ptr %own, i64 %dim",
        tiles.load(OWN, "%own_at", "%row_bytes"),
        f"  %pair_item = mul i64 %dim, {BLOCK // 2}\n  %pair = getelementptr i32, ptr %keys, i64 %pair_item",
        *_shared("%pair", str(4 * BLOCK)),
    ])
    stores = joined([
        f"  %to_scores{i} = getelementptr float, ptr %scores, i64 {LANES * i}\n"
        + tiles.store(i, f"%to_scores{i}", str(4 * BLOCK)) for i in range(SUMS)
    ])
    return f"""
define internal void @attend_scores_by_tiles(
  ptr %q, ptr %states, ptr %keys, ptr %scores, i64 %H, i64 %query, i64 %count
) noinline {{
entry:
  %row_bytes = mul i64 %H, 2
  %first = mul i64 %query, %H
  %own = getelementptr bfloat, ptr %q, i64 %first
{joined([tiles.zero(i) for i in range(SUMS)])}
{loop("dim", "0", "%H", DIM_STEP, step, "entry")}
{stores}
  ret void
}}
"""


def _shared(first: str, stride: str) -> list[str]:
    """Multiplies register OWN with four tiles side by side, from `first` on."""
    lines = []
    for i in range(SUMS):
        register = SHARED + i % 3
        at = f"{first}_{i}"
        lines += [
            f"  {at} = getelementptr i32, ptr {first}, i64 {LANES * i}", tiles.load(register, at, stride),
            tiles.multiply(tiles.BFLOAT16, i, OWN, register),
        ]
    return lines


def _sums() -> str:
    """A whole batch's sums are added to where they are; those of fewer queries in a copy: behind them are others'."""
    scale = f"""  %d_item = add i64 %n_item, %d
  %old_at = getelementptr float, ptr %from, i64 %d_item
  %old = load {VECTOR}, ptr %old_at, align 64
  %scaled = fmul {VECTOR} %old, %keeps
  %kept_at = getelementptr float, ptr %sums, i64 %d_item
  store {VECTOR} %scaled, ptr %kept_at, align 64"""
    rows = f"""  %number = add i64 %query, %n
  %n_item = mul i64 %n, %H
{read("keep", "%number")}
{broadcast("keeps", "%keep")}
{loop("d", "0", "%H", LANES, scale, "n_loop")}"""
    return f"""
define internal void @attend_sums_by_tiles(
  ptr %out, ptr %states, ptr %values, ptr %weights, i64 %H, i64 %query, i64 %count, i64 %pairs, i1 %has_risen
) noinline {{
entry:
  %row_bytes = mul i64 %H, 4
  %first = mul i64 %query, %H
  %from = getelementptr float, ptr %out, i64 %first
  %is_whole = icmp eq i64 %count, {BATCH}
  %own_bytes = mul i64 %row_bytes, {BATCH}
  br i1 %is_whole, label %in_place, label %aside
aside:
  %copy = alloca i8, i64 %own_bytes, align 64
  br label %scale
in_place:
  br i1 %has_risen, label %scale, label %scaled_all
scale:
  %sums = phi ptr [%from, %in_place], [%copy, %aside]
{loop("n", "0", "%count", 1, rows, "scale")}
  br label %scaled_all
scaled_all:
  %own = phi ptr [%from, %in_place], [%sums, %n_end]
{loop("dim", "0", "%H", DIM_STEP, _dims(), "scaled_all")}
  br i1 %is_whole, label %done, label %back
back:
  %back_bytes = mul i64 %row_bytes, %count
  call void @llvm.memcpy.p0.p0.i64(ptr %from, ptr %own, i64 %back_bytes, i1 false)
  br label %done
done:
  ret void
}}
"""


def _dims() -> str:
    """Sums of two tiles of head dimensions from %dim on, over steps of 32 slots that somebody sees."""
    places = joined([
        f"  %dim{i} = add i64 %dim, {LANES * i}\n  %sum{i} = getelementptr float, ptr %own, i64 %dim{i}"
        for i in range(2)
    ])
    step = joined([
        "  %weights_at = getelementptr i32, ptr %weights, i64 %pair", tiles.load(OWN, "%weights_at", str(2 * BLOCK)),
        "  %pair_item = mul i64 %pair, %H\n  %values_row = getelementptr i32, ptr %values, i64 %pair_item",
        *(
            f"  %values{i} = getelementptr i32, ptr %values_row, i64 %dim{i}\n"
            + tiles.load(SHARED + i, f"%values{i}", "%row_bytes") + "\n"
            + tiles.multiply(tiles.BFLOAT16, i, OWN, SHARED + i) for i in range(2)
        ),
    ])
    return f"""{places}
{joined([tiles.load(i, f"%sum{i}", "%row_bytes") for i in range(2)])}
{loop("pair", "0", "%pairs", SIDE, step, "dim_loop")}
{joined([tiles.store(i, f"%sum{i}", "%row_bytes") for i in range(2)])}"""
