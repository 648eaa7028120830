"""Attention over paged bfloat16 keys and values, for decode entries and for tiles of prompt tokens alike.

Item: consecutive query tokens of one sequence. Chunk: one or some items and one kv head; block after block of context
(`blocks`) for those items that keep it in the same pages (`items`), batch after batch of their (token, head) queries
(`queries`), by online softmax in float32.
Weights are rounded to bfloat16 for the products with values, as XLA's form rounds them.
Traffic: keys and values of an item's context once from memory, what neighbours share once for all of them; a block's
buffers (H x 512 bytes) stay in the caches.
Invariant: a query's result comes of its own slots alone, by the same additions in the same order beside any others:
what it may not see weighs nothing, whatever it holds. Where a value that only some queries see is not finite (0 x NaN
is NaN), each query of the block gets values of its own.
"""

from __future__ import annotations

from kernels_pallas.native import blocks, items, queries, query_tiles, tiles
from kernels_pallas.native.blocks import BLOCK, DIM_STEP, SOURCE
from kernels_pallas.native.items import BLOCK_OF_ITEMS, ITEM, ITEM_WORDS, RUN
from kernels_pallas.native.queries import BATCH, STATE_BYTES, VECTOR
from kernels_pallas.native.runtime import RESULT_TABLE, arguments, joined, loaded, loop, of_thread, stored
from kernels_pallas.native.vectors import LANES, broadcast

NAME = "jaxserve_attend"
DIM_MAX = 256

POINTERS = ("q", "k", "v", "pages", "tokens", "rows", "positions", "sizes", "settings", "scale", "sinks", "out")
WORDS = [(name, "ptr") for name in POINTERS] + [("K", "i64"), ("all_items", "i64")]
OF_STEP = {"q": "q_all", "out": "out_all"}      # in a chunk, whose own queries and sums have the short names
SETTINGS = ("window", "N", "S", "M", "H", "span")     # int32


def kernel(*, has_tiles: bool) -> str:
    """IR of all parts, the chunk, and the setup.

    Args:
      has_tiles: whether tile registers multiply; needs `tiles.shared`.
    """
    of_tiles = (tiles.CONFIGURE, tiles.RELEASE) if has_tiles else ()
    return "\n".join([
        blocks.parts(), queries.parts(), query_tiles.parts() if has_tiles else "", _begin(), _finish(),
        _run(has_tiles=has_tiles), items.parts(), _chunk(), _setup(), of_thread(NAME, *of_tiles),
    ])


def _begin() -> str:
    """@attend_begin: an item's queries before their first slot, side by side; number n is token n / G, head n % G."""
    copy = f"""  %from_at = getelementptr bfloat, ptr %from, i64 %d
  %some = load <{DIM_STEP} x bfloat>, ptr %from_at, align 2
  %to_at = getelementptr bfloat, ptr %to, i64 %d
  store <{DIM_STEP} x bfloat> %some, ptr %to_at, align 64"""
    body = f"""  %later = udiv i64 %n, %G
  %of_group = urem i64 %n, %G
  %head = add i64 %head_first, %of_group
  %token_now = add i64 %token, %later
  %token_heads = mul i64 %token_now, %N
  %row = add i64 %token_heads, %head
  %place = mul i64 %row, %H
  %number = add i64 %base, %n
  %item = mul i64 %number, %H
  %position_now = add i64 %position, %later
  %end_now = add i64 %position_now, 1
  %sink_at = getelementptr float, ptr %sinks, i64 %head
  %sink = load float, ptr %sink_at
{queries.first_state("%number", "%item", "%place", "%end_now", "%sink")}
  %from = getelementptr bfloat, ptr %q, i64 %place
  %to = getelementptr bfloat, ptr %own, i64 %item
{loop("d", "0", "%H", DIM_STEP, copy, "n_loop")}"""
    return f"""
define internal void @attend_begin(
  ptr %q, ptr %own, ptr %states, ptr %sinks, i64 %N, i64 %G, i64 %H, i64 %head_first, i64 %token, i64 %position,
  i64 %base, i64 %queries
) noinline {{
entry:
{loop("n", "0", "%queries", 1, body, "entry")}
  ret void
}}
"""


def _finish() -> str:
    """@attend_finish: divides every query's sums by the weights it has added up; nothing seen gives zero."""
    scale = f"""  %sum_at = getelementptr float, ptr %sums, i64 %d
  %sum = load {VECTOR}, ptr %sum_at, align 4
  %mean = fmul {VECTOR} %sum, %parts
  %short = fptrunc {VECTOR} %mean to <{LANES} x bfloat>
  %to_at = getelementptr bfloat, ptr %to, i64 %d
  store <{LANES} x bfloat> %short, ptr %to_at, align 2"""
    body = f"""{queries.read("item", "%n")}
{queries.read("place", "%n")}
{queries.read("total", "%n")}
  %sums = getelementptr float, ptr %own, i64 %item
  %to = getelementptr bfloat, ptr %out, i64 %place
  %empty = fcmp oeq float %total, 0.0
  %divisor = select i1 %empty, float 1.0, float %total
  %part = fdiv float 1.0, %divisor
{broadcast("parts", "%part")}
{loop("d", "0", "%H", LANES, scale, "n_loop")}"""
    return f"""
define internal void @attend_finish(ptr %own, ptr %out, ptr %states, i64 %H, i64 %queries) noinline {{
entry:
{loop("n", "0", "%queries", 1, body, "entry")}
  ret void
}}
"""


def _batch(own: str, by: str) -> str:
    """A batch of queries that some slots of the block are seen by.

    Args:
      own: SOURCE of what this one query sees, where it must not meet other values.  by: who multiplies.
    """
    return f"""seen:
  br i1 %is_careful, label %careful, label %batch
careful:                                        ; 0 x NaN is NaN: what this query does not see must be 0 x 0
  call void @attend_block_values(ptr %v, {own}, ptr %values)
  br label %batch
batch:
  %end_most = call i64 @llvm.smax.i64(i64 %end_first, i64 %end_last)    ; tiles rise, decodes fall
  %slots_left = sub i64 %end_most, %at
  %slots = call i64 @llvm.smin.i64(i64 %slots_left, i64 {BLOCK})
  %slots_even = add i64 %slots, 1
  %pairs = udiv i64 %slots_even, 2
  call void @attend_scores{by}(ptr %q, ptr %states, ptr %keys, ptr %scores, i64 %H, i64 %query, i64 %count)
  %has_risen = call i1 @attend_weights(
    ptr %states, ptr %scores, ptr %weights, i64 %query, i64 %count, i64 %at, i64 %window, float %scale_power
  )
  call void @attend_sums{by}(
    ptr %out, ptr %states, ptr %values, ptr %weights, i64 %H, i64 %query, i64 %count, i64 %pairs, i1 %has_risen
  )
  br label %batch_end"""


def _run(*, has_tiles: bool) -> str:
    """@attend_run: a block for items with the same pages of it: fills the buffers, then takes batches of queries."""
    source = SOURCE.removeprefix("ptr %pages, ")
    own = source.replace("%low", "%low_first").replace("%high", "%end_first")
    by = "_by_tiles" if has_tiles else ""
    return f"""
define internal void @attend_run({RUN}) noinline {{
entry:
  call void @attend_block_keys(ptr %k, {source}, ptr %keys)
  call void @attend_block_values(ptr %v, {source}, ptr %values)
  %at_past = add i64 %at, {BLOCK}
  %is_past_first = icmp sgt i64 %at_past, %first_end
  %is_before_last = icmp slt i64 %at, %last_low
  %is_edge = or i1 %is_past_first, %is_before_last
  %is_partial = and i1 %is_edge, %is_many
  br i1 %is_partial, label %look, label %batches
look:
  %is_finite = call i1 @attend_is_finite(ptr %values, i64 %H)
  %is_not_finite = xor i1 %is_finite, true
  br label %batches
batches:
  %is_careful = phi i1 [false, %entry], [%is_not_finite, %look]
  %batch_size = select i1 %is_careful, i64 1, i64 {BATCH}
  br label %batches_loop
batches_loop:
  %query = phi i64 [%query_first, %batches], [%query_next, %batch_end]
{queries.read("end", "%query", "_first")}
  %left = sub i64 %query_stop, %query
  %count = call i64 @llvm.smin.i64(i64 %left, i64 %batch_size)
  %query_next = add i64 %query, %count
  %query_last = sub i64 %query_next, 1
{queries.read("end", "%query_last", "_last")}
  %low_first = sub i64 %end_first, %window
  %is_before_end = icmp slt i64 %at, %end_last
  %is_after_low = icmp sgt i64 %at_past, %low_first
  %is_seen = and i1 %is_before_end, %is_after_low
  br i1 %is_seen, label %seen, label %batch_end
{_batch(own, by)}
batch_end:
  %more = icmp slt i64 %query_next, %query_stop
  br i1 %more, label %batches_loop, label %exit
exit:
  ret void
}}
"""


def _begin_item() -> str:
    """The states of item %n of the chunk, which follow those of the items before it."""
    return f"""  %note = getelementptr [{ITEM_WORDS} x i64], ptr %items, i64 %n
  %number_at = getelementptr i64, ptr %note, i64 {ITEM["number"][1]}
  %number = load i64, ptr %number_at
  %of_item_at = getelementptr i64, ptr %note, i64 {ITEM["queries"][1]}
  %of_item = load i64, ptr %of_item_at
  %base_at = getelementptr i64, ptr %note, i64 {ITEM["query"][1]}
  %base = load i64, ptr %base_at
  %token_at = getelementptr i32, ptr %tokens, i64 %number
  %token_short = load i32, ptr %token_at
  %token = sext i32 %token_short to i64
  %position_at = getelementptr i32, ptr %positions, i64 %number
  %position_short = load i32, ptr %position_at
  %position = sext i32 %position_short to i64
  call void @attend_begin(ptr %q_all, ptr %q, ptr %states, ptr %sinks, i64 %N, i64 %G, i64 %H, i64 %head_first,
    i64 %token, i64 %position, i64 %base, i64 %of_item)"""


def _chunk() -> str:
    """@NAME_chunk: chunk = group of items * K + kv head."""
    settings = joined([
        f"  %{name}_at = getelementptr i32, ptr %settings, i64 {index}\n"
        f"  %{name}_short = load i32, ptr %{name}_at\n"
        f"  %{name} = sext i32 %{name}_short to i64" for index, name in enumerate(SETTINGS)
    ])
    return f"""
define internal void @{NAME}_chunk(ptr %operands, i64 %chunk, ptr %own) {{
entry:
{loaded([(OF_STEP.get(name, name), kind) for name, kind in WORDS])}
{settings}
  %group = udiv i64 %chunk, %K
  %kv_head = urem i64 %chunk, %K
  %item_first = mul i64 %group, %span
  %item_far = add i64 %item_first, %span
  %item_stop = call i64 @llvm.smin.i64(i64 %item_far, i64 %all_items)
  %G = udiv i64 %N, %K
  %items = alloca [{ITEM_WORDS} x i64], i64 %span, align 64
  %noted = call {{ i64, i64, i64, i64 }} @attend_items(ptr %pages, ptr %rows, ptr %positions, ptr %sizes, ptr %items,
    i64 %M, i64 %G, i64 %window, i64 %item_first, i64 %item_stop)
  %item_count = extractvalue {{ i64, i64, i64, i64 }} %noted, 0
  %queries = extractvalue {{ i64, i64, i64, i64 }} %noted, 1
  %high = extractvalue {{ i64, i64, i64, i64 }} %noted, 2
  %low = extractvalue {{ i64, i64, i64, i64 }} %noted, 3
  %is_any = icmp sgt i64 %item_count, 0
  br i1 %is_any, label %begin, label %exit
begin:
  %slots_size = mul i64 %S, %H
  %page_step = mul i64 %slots_size, %K
  %head_step = mul i64 %slots_size, %kv_head
  %head_first = mul i64 %kv_head, %G
  %scale_power = load float, ptr %scale
  %buffer_bytes = mul i64 %H, {4 * BLOCK // 2}
  %keys = alloca i8, i64 %buffer_bytes, align 64
  %values = alloca i8, i64 %buffer_bytes, align 64
  %scores = alloca [{BATCH * BLOCK} x float], align 64
  %weights = alloca [{BATCH * BLOCK} x bfloat], align 64
  %states_bytes = mul i64 %queries, {STATE_BYTES}
  %states = alloca i8, i64 %states_bytes, align 64
  %batches_far = add i64 %queries, {2 * BATCH - 1}     ; a batch's last rows may lie past the last query
  %rows_own = and i64 %batches_far, {-BATCH}
  %numbers_own = mul i64 %rows_own, %H
  %bytes_own = mul i64 %numbers_own, 6
  %q = call ptr @aligned_alloc(i64 64, i64 %bytes_own)
  %out = getelementptr bfloat, ptr %q, i64 %numbers_own
  %sums_bytes = mul i64 %numbers_own, 4
  call void @llvm.memset.p0.i64(ptr %out, i8 0, i64 %sums_bytes, i1 false)
{loop("n", "0", "%item_count", 1, _begin_item(), "begin")}
  %first_block = and i64 %low, {-BLOCK}
{loop("at", "%first_block", "%high", BLOCK, f"  call void @attend_block({BLOCK_OF_ITEMS})", "n_end")}
  call void @attend_finish(ptr %out, ptr %out_all, ptr %states, i64 %H, i64 %queries)
  call void @free(ptr %q)
  br label %exit
exit:
  ret void
}}
"""


def _setup() -> str:
    """@NAME_setup: fills the operands from the frame; items * K chunks."""
    return f"""
define internal i64 @{NAME}_setup(ptr %operands, ptr %frame) {{
{arguments(POINTERS[:-1])}
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %out = call ptr @data(ptr %out_buffer)
  %K = call i64 @size(ptr %k_buffer, i64 1)
  %all_items = call i64 @size(ptr %tokens_buffer, i64 0)
  %span_at = getelementptr i32, ptr %settings, i64 {SETTINGS.index("span")}
  %span_short = load i32, ptr %span_at
  %span = sext i32 %span_short to i64
{stored(WORDS)}
  %items_more = add i64 %all_items, %span
  %items_above = sub i64 %items_more, 1
  %groups = udiv i64 %items_above, %span
  %chunks = mul i64 %groups, %K
  ret i64 %chunks
}}
"""
