"""Attention over paged bfloat16 keys and values, for decode entries and for tiles of prompt tokens alike.

Item: consecutive query tokens of one sequence. Chunk: one item and one kv head. Block: 64 context slots, taken from
their pages into two buffers that every query of the chunk reads: keys by pairs of head dimensions, a slot a lane, so
that a query's 16 scores come out side by side; values by pairs of slots, so that both products multiply pairwise
(`vdpbf16ps`). Group: four (token, head) queries, whose scores, and then whose sums for 64 head dimensions, fill 16
registers. Between blocks a query's sums rest in its row of the result: online softmax, in float32; weights are rounded
to bfloat16 for the products with values, as XLA's form rounds them.
Traffic: keys and values of an item's context once from memory; a block's buffers (H x 256 bytes) stay in the caches.
Work: half a load a multiplication, and some 110 instructions a query and block for its weights.
Invariant: a query's result comes of its own slots alone, by the same additions in the same order beside any others:
what it may not see weighs nothing, whatever it holds. Where a value that only some queries see is not finite (0 x NaN
is NaN), each query of the block gets buffers of its own.
"""

from __future__ import annotations

from kernels_pallas.native import blocks
from kernels_pallas.native.blocks import BLOCK, DIM_STEP, SOURCE
from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, joined, loaded, loop, stored
from kernels_pallas.native.vectors import LANES, broadcast, dot_pairs, indices, number, splat

NAME = "jaxserve_attend"
DIM_MAX = 256
GROUP = 4           # queries
WIDE = BLOCK        # head dimensions whose sums are in registers at once; the rest, if any, is DIM_STEP
NOTHING = -1e30     # finite, so that NOTHING - NOTHING is 0 and not NaN

POINTERS = ("q", "k", "v", "pages", "tokens", "rows", "positions", "sizes", "settings", "scale", "sinks", "out")
WORDS = [(name, "ptr") for name in POINTERS] + [("K", "i64")]
VECTOR = "<16 x float>"
ORDER = list(range(LANES))


def kernel() -> str:
    """IR of all parts, the chunk, and the setup."""
    return "\n".join([blocks.parts(), _begin(), _block(), _finish(), _chunk(), _setup()])


CHUNK = ("ptr %q, ptr %out, ptr %tops, ptr %totals, ptr %sinks, i64 %N, i64 %G, i64 %H, i64 %head_first, i64 %token, "
         "i64 %position, i64 %window")


def _query(number_: str, i: str = "") -> str:
    """Where a query of the chunk lies in q and out, and the slots [begin, end) that it sees."""
    return f"""  %later{i} = udiv i64 {number_}, %G
  %of_group{i} = urem i64 {number_}, %G
  %head{i} = add i64 %head_first, %of_group{i}
  %token{i} = add i64 %token, %later{i}
  %token_heads{i} = mul i64 %token{i}, %N
  %row{i} = add i64 %token_heads{i}, %head{i}
  %item{i} = mul i64 %row{i}, %H
  %q{i} = getelementptr bfloat, ptr %q, i64 %item{i}
  %out{i} = getelementptr float, ptr %out, i64 %item{i}
  %top_at{i} = getelementptr float, ptr %tops, i64 {number_}
  %total_at{i} = getelementptr float, ptr %totals, i64 {number_}
  %position{i} = add i64 %position, %later{i}
  %end{i} = add i64 %position{i}, 1
  %past{i} = sub i64 %end{i}, %window
  %begin{i} = call i64 @llvm.smax.i64(i64 %past{i}, i64 0)"""


def _begin() -> str:
    """@attend_begin: every query before its first slot; a sink is a score without a value."""
    body = f"""{_query("%n", "_n")}
  %sink_at = getelementptr float, ptr %sinks, i64 %head_n
  %sink = load float, ptr %sink_at
  %has_sink = fcmp ogt float %sink, {number(NOTHING)}
  %top = select i1 %has_sink, float %sink, float {number(NOTHING)}
  %total = select i1 %has_sink, float 1.0, float 0.0
  store float %top, ptr %top_at_n
  store float %total, ptr %total_at_n
  %bytes = mul i64 %H, 4
  call void @llvm.memset.p0.i64(ptr %out_n, i8 0, i64 %bytes, i1 false)"""
    return f"""
define internal void @attend_begin({CHUNK}, i64 %queries) noinline {{
entry:
{loop("n", "0", "%queries", 1, body, "entry")}
  ret void
}}
"""


def _finish() -> str:
    """@attend_finish: divides every query's sums by its denominator; nothing seen gives zero."""
    scale = f"""  %sum_at = getelementptr float, ptr %out_n, i64 %d
  %sum = load {VECTOR}, ptr %sum_at, align 4
  %mean = fmul {VECTOR} %sum, %parts
  store {VECTOR} %mean, ptr %sum_at, align 4"""
    body = f"""{_query("%n", "_n")}
  %all = load float, ptr %total_at_n
  %empty = fcmp oeq float %all, 0.0
  %divisor = select i1 %empty, float 1.0, float %all
  %part = fdiv float 1.0, %divisor
{broadcast("parts", "%part")}
{loop("d", "0", "%H", LANES, scale, "n_loop")}"""
    return f"""
define internal void @attend_finish({CHUNK}, i64 %queries) noinline {{
entry:
{loop("n", "0", "%queries", 1, body, "entry")}
  ret void
}}
"""


def _block() -> str:
    """@attend_block: four queries from number %query on (past %last: the last once more) over the block at slot %at."""
    each = range(GROUP)
    numbers = joined([
        f"  %number{i}_far = add i64 %query, {i}\n"
        f"  %number{i} = call i64 @llvm.smin.i64(i64 %number{i}_far, i64 %last)\n" + _query(f"%number{i}", str(i))
        for i in each
    ])
    return f"""
define internal void @attend_block(
  {CHUNK}, ptr noalias %keys, ptr noalias %values, ptr noalias %weights, i64 %query, i64 %last, i64 %at,
  float %scale_power
) noinline {{
entry:
{numbers}
  %at_next = add i64 %at, {BLOCK}
  %is_before_end = icmp slt i64 %at, %end{GROUP - 1}
  %is_after_begin = icmp sgt i64 %at_next, %begin0
  %is_seen = and i1 %is_before_end, %is_after_begin
  %pairs = udiv i64 %H, 2
{broadcast("scales", "%scale_power")}
  br i1 %is_seen, label %scores, label %exit

scores:
{_products("score", "%pairs", BLOCK // LANES, "%keys", str(BLOCK), [f"%q{i}" for i in each], None, "scores")}
{joined([_weights(i) for i in each])}
  %whole = and i64 %H, {-WIDE}
  br label %wide
wide:
{_value_loop("wide", WIDE)}
  %has_rest = icmp slt i64 %whole, %H
  br i1 %has_rest, label %narrow, label %exit
narrow:
{_rest()}
  br label %exit
exit:
  ret void
}}
"""


def _products(
    name: str, turns: str, registers: int, shared: str, stride: str, rows: list[str], first: list[str] | None,
    before: str,
) -> str:
    """Adds up pairs: a turn multiplies `registers` of %shared's row with a pair of each query's row, in all lanes.

    Args:
      turns: how many pairs.  stride: 4-byte words of a row of `shared`.  first: the sums to begin with, or zeros.
      before: the block it is entered from. It goes on in block NAME_end, with the sums %NAME_sumI_R.
    """
    names = [(i, r) for i in range(len(rows)) for r in range(registers)]
    phis = [
        f"  %{name}_so_far{i}_{r} = phi {VECTOR} [{first[i * registers + r] if first else 'zeroinitializer'}, "
        f"%{before}], [%{name}_sum{i}_{r}, %{name}_loop]" for i, r in names
    ]
    loads = [f"  %{name}_item = mul i64 %{name}, {stride}\n"
             f"  %{name}_row = getelementptr i32, ptr {shared}, i64 %{name}_item"]
    for r in range(registers):
        loads.append(
            f"  %{name}_shared{r}_at = getelementptr i32, ptr %{name}_row, i64 {r * LANES}\n"
            f"  %{name}_shared{r} = load <32 x bfloat>, ptr %{name}_shared{r}_at, align 64"
        )
    products = []
    for i, row in enumerate(rows):
        products.append(
            f"  %{name}_own{i}_at = getelementptr i32, ptr {row}, i64 %{name}\n"
            f"  %{name}_own{i} = load i32, ptr %{name}_own{i}_at, align 2\n"
            f"{broadcast(f'{name}_owns{i}', f'%{name}_own{i}', 'i32')}\n"
            f"  %{name}_two{i} = bitcast <16 x i32> %{name}_owns{i} to <32 x bfloat>"
        )
        for r in range(registers):
            added = dot_pairs(f"{VECTOR} %{name}_so_far{i}_{r}", f"%{name}_shared{r}", f"%{name}_two{i}")
            products.append(f"  %{name}_sum{i}_{r} = {added}")
    return f"""  br label %{name}_loop
{name}_loop:
  %{name} = phi i64 [0, %{before}], [%{name}_next, %{name}_loop]
{joined(phis + loads + products)}
  %{name}_next = add i64 %{name}, 1
  %{name}_again = icmp slt i64 %{name}_next, {turns}
  br i1 %{name}_again, label %{name}_loop, label %{name}_end
{name}_end:"""


def _weights(i: int) -> str:
    """Of query i: its scores' powers, rounded and stored for the products with values; its new maximum and total."""
    each = range(BLOCK // LANES)
    lines = [
        f"  %low{i}_far = sub i64 %begin{i}, %at\n  %low{i} = trunc i64 %low{i}_far to i32\n"
        f"  %high{i}_far = sub i64 %end{i}, %at\n  %high{i} = trunc i64 %high{i}_far to i32",
        broadcast(f"lows{i}", f"%low{i}", "i32"), broadcast(f"highs{i}", f"%high{i}", "i32"),
    ]
    for r in each:
        slots = indices([r * LANES + lane for lane in ORDER])
        lines.append(
            f"  %scaled{i}_{r} = fmul {VECTOR} %score_sum{i}_{r}, %scales\n"
            f"  %from{i}_{r} = icmp sge {slots}, %lows{i}\n  %until{i}_{r} = icmp slt {slots}, %highs{i}\n"
            f"  %seen{i}_{r} = and <16 x i1> %from{i}_{r}, %until{i}_{r}\n"
            f"  %score{i}_{r} = select <16 x i1> %seen{i}_{r}, {VECTOR} %scaled{i}_{r}, {splat(NOTHING)}"
        )
    lines += _folded(f"most{i}", [f"%score{i}_{r}" for r in each], "call {0} @llvm.maxnum.v16f32({0} {1}, {0} {2})")
    lines.append(f"""  %most{i}_one = call float @llvm.vector.reduce.fmax.v16f32({VECTOR} %most{i})
  %top{i} = load float, ptr %top_at{i}
  %higher{i} = fcmp ogt float %most{i}_one, %top{i}
  %top_new{i} = select i1 %higher{i}, float %most{i}_one, float %top{i}
  %fall{i} = fsub float %top{i}, %top_new{i}
{broadcast(f"falls{i}", f"%fall{i}")}
  %keep{i} = call {VECTOR} @power({VECTOR} %falls{i})
  %keep{i}_one = extractelement {VECTOR} %keep{i}, i64 0
{broadcast(f"tops{i}", f"%top_new{i}")}""")
    for r in each:
        lines.append(
            f"  %below{i}_{r} = fsub {VECTOR} %score{i}_{r}, %tops{i}\n"
            f"  %power{i}_{r} = call {VECTOR} @power({VECTOR} %below{i}_{r})\n"
            f"  %weight{i}_{r} = select <16 x i1> %seen{i}_{r}, {VECTOR} %power{i}_{r}, {VECTOR} zeroinitializer\n"
            f"  %short{i}_{r} = fptrunc {VECTOR} %weight{i}_{r} to <16 x bfloat>\n"
            f"  %short{i}_{r}_at = getelementptr bfloat, ptr %weights, i64 {i * BLOCK + r * LANES}\n"
            f"  store <16 x bfloat> %short{i}_{r}, ptr %short{i}_{r}_at, align 32"
        )
    lines += _folded(f"sum{i}", [f"%weight{i}_{r}" for r in each], "fadd {0} {1}, {2}")
    lines.append(f"""  %sum{i}_one = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {VECTOR} %sum{i})
  %total{i} = load float, ptr %total_at{i}
  %total_kept{i} = fmul float %total{i}, %keep{i}_one
  %total_new{i} = fadd float %total_kept{i}, %sum{i}_one
  %weights{i} = getelementptr bfloat, ptr %weights, i64 {i * BLOCK}""")
    # Loads of all come before stores of any: the last query may be there more than once.
    if i == GROUP - 1:
        lines += [
            f"  store float %top_new{j}, ptr %top_at{j}\n  store float %total_new{j}, ptr %total_at{j}"
            for j in range(GROUP)
        ]
    return joined(lines)


def _folded(name: str, values: list[str], combine: str) -> list[str]:
    """Combines four registers into %NAME."""
    first, second, third, fourth = values
    return [
        f"  %{name}_a = {combine.format(VECTOR, first, second)}",
        f"  %{name}_b = {combine.format(VECTOR, third, fourth)}",
        f"  %{name} = {combine.format(VECTOR, f'%{name}_a', f'%{name}_b')}",
    ]


def _value_sums(name: str, width: int, dim: str, before: str) -> str:
    """Adds the block's weighted values to the queries' sums of `width` head dimensions from `dim` on."""
    names = [(i, r) for i in range(GROUP) for r in range(width // LANES)]
    loads = [
        f"  %{name}_at{i}_{r}_item = add i64 {dim}, {r * LANES}\n"
        f"  %{name}_at{i}_{r} = getelementptr float, ptr %out{i}, i64 %{name}_at{i}_{r}_item\n"
        f"  %{name}_old{i}_{r} = load {VECTOR}, ptr %{name}_at{i}_{r}, align 4\n"
        f"  %{name}_kept{i}_{r} = fmul {VECTOR} %{name}_old{i}_{r}, %keep{i}" for i, r in names
    ]
    stores = [f"  store {VECTOR} %{name}_sum{i}_{r}, ptr %{name}_at{i}_{r}, align 4" for i, r in names]
    products = _products(
        name, str(BLOCK // 2), width // LANES, f"%{name}_values", "%H", [f"%weights{i}" for i in range(GROUP)],
        [f"%{name}_kept{i}_{r}" for i, r in names], before,
    )
    return joined([*loads, f"  %{name}_values = getelementptr i32, ptr %values, i64 {dim}", products, *stores])


def _value_loop(name: str, width: int) -> str:
    """All of the head dimensions that come by `width`."""
    return loop(f"{name}_dim", "0", "%whole", width,
                 _value_sums(f"{name}_pair", width, f"%{name}_dim", f"{name}_dim_loop"), name)


def _rest() -> str:
    return _value_sums("rest_pair", DIM_STEP, "%whole", "narrow")


def _turn() -> str:
    """A block: fills the buffers, then all groups of queries; one by one where what they do not see is not finite."""
    source = SOURCE.removeprefix("ptr %pages, ")
    own = source.replace("%low", "%own_low").replace("%high", "%own_high")
    one_query = f"""  br i1 %is_careful, label %careful, label %group
careful:                                        ; 0 x NaN is NaN: what this query does not see must be 0 x 0
  %own_later = udiv i64 %query, %G
  %own_position = add i64 %position, %own_later
  %own_high = add i64 %own_position, 1
  %own_low = sub i64 %own_high, %window
  call void @attend_block_values(ptr %v, {own}, ptr %values)
  br label %group
group:
  %last = select i1 %is_careful, i64 %query, i64 %query_last
  call void @attend_block({CHUNK}, ptr %keys, ptr %values, ptr %weights, i64 %query, i64 %last, i64 %at,
    float %scale_power)
  %query_next = add i64 %query, %query_step
  %more = icmp slt i64 %query_next, %queries
  br i1 %more, label %queries_loop, label %queries_end"""
    return f"""  call void @attend_block_keys(ptr %k, {source}, ptr %keys)
  call void @attend_block_values(ptr %v, {source}, ptr %values)
  %at_past = add i64 %at, {BLOCK}
  %is_past_first = icmp sgt i64 %at_past, %first_end
  %is_before_last = icmp slt i64 %at, %last_low
  %is_edge = or i1 %is_past_first, %is_before_last
  %is_partial = and i1 %is_edge, %is_many
  br i1 %is_partial, label %look, label %queries_begin
look:
  %is_finite = call i1 @attend_is_finite(ptr %values, i64 %H)
  %is_not_finite = xor i1 %is_finite, true
  br label %queries_begin
queries_begin:
  %is_careful = phi i1 [false, %at_loop], [%is_not_finite, %look]
  %query_step = select i1 %is_careful, i64 1, i64 {GROUP}
  br label %queries_loop
queries_loop:
  %query = phi i64 [0, %queries_begin], [%query_next, %group]
{one_query}
queries_end:"""


def _chunk() -> str:
    """@NAME_chunk: chunk = item * K + kv head; items of size 0 are padding."""
    of_item = joined([
        f"  %{name}_at = getelementptr i32, ptr %{name}s, i64 %item\n"
        f"  %{name}_short = load i32, ptr %{name}_at\n"
        f"  %{name} = sext i32 %{name}_short to i64" for name in ("token", "row", "position", "size")
    ])
    settings = joined([
        f"  %{name}_at = getelementptr i32, ptr %settings, i64 {index}\n"
        f"  %{name}_short = load i32, ptr %{name}_at\n"
        f"  %{name} = sext i32 %{name}_short to i64" for index, name in enumerate(("window", "N", "S", "M", "H"))
    ])
    return f"""
define internal void @{NAME}_chunk(ptr %operands, i64 %chunk) {{
entry:
{loaded(WORDS)}
  %item = udiv i64 %chunk, %K
  %kv_head = urem i64 %chunk, %K
{of_item}
  %is_item = icmp sgt i64 %size, 0
  br i1 %is_item, label %begin, label %exit
begin:
{settings}
  %table_item = mul i64 %row, %M
  %table = getelementptr i32, ptr %pages, i64 %table_item
  %slots_size = mul i64 %S, %H
  %page_step = mul i64 %slots_size, %K
  %head_step = mul i64 %slots_size, %kv_head
  %G = udiv i64 %N, %K
  %head_first = mul i64 %kv_head, %G
  %queries = mul i64 %size, %G
  %query_last = sub i64 %queries, 1
  %scale_power = load float, ptr %scale
  %buffer_bytes = mul i64 %H, {4 * BLOCK // 2}
  %keys = alloca i8, i64 %buffer_bytes, align 64
  %values = alloca i8, i64 %buffer_bytes, align 64
  %weights = alloca [{GROUP * BLOCK} x bfloat], align 64
  %tops = alloca float, i64 %queries
  %totals = alloca float, i64 %queries
  %is_many = icmp sgt i64 %size, 1
  %first_end = add i64 %position, 1
  %high = add i64 %position, %size              ; slots that some query sees: [low, high)
  %first_low = sub i64 %first_end, %window
  %low = call i64 @llvm.smax.i64(i64 %first_low, i64 0)
  %last_low = sub i64 %high, %window
  call void @attend_begin({CHUNK}, i64 %queries)
  %first_block = and i64 %low, {-BLOCK}
{loop("at", "%first_block", "%high", BLOCK, _turn(), "begin")}
  call void @attend_finish({CHUNK}, i64 %queries)
  br label %exit
exit:
  ret void
}}
"""


def _setup() -> str:
    """@NAME_setup: fills the operands from the frame; items * K chunks."""
    arguments = joined([
        f"  %{name}_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 {index})\n"
        f"  %{name} = call ptr @data(ptr %{name}_buffer)" for index, name in enumerate(POINTERS[:-1])
    ])
    return f"""
define internal i64 @{NAME}_setup(ptr %operands, ptr %frame) {{
{arguments}
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %out = call ptr @data(ptr %out_buffer)
  %K = call i64 @size(ptr %k_buffer, i64 1)
  %items = call i64 @size(ptr %tokens_buffer, i64 0)
{stored(WORDS)}
  %chunks = mul i64 %items, %K
  ret i64 %chunks
}}
"""
