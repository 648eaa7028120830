"""What a block of context slots (`blocks`) does to a batch of up to 16 queries: scores, weights, weighted sums.

Each of the three is one pass over the batch, so that the long chain of instructions between a query's scores and its
weights runs beside those of other queries. Four queries at a time fill 16 registers with scores (4 x 64 slots) or sums
(4 x 64 head dimensions); a turn multiplies a pair of each with four registers of the block's buffer. Between blocks a
query's sums rest in its row of the chunk's own, unscaled, and the rest of its online softmax in its state.
Work: half a load a multiplication; some 100 instructions a query and block for its weights.
Invariant: weights of slots that a query does not see are zero; a query's numbers do not depend on its batch.
"""

from __future__ import annotations

from kernels_pallas.native.blocks import BLOCK, DIM_STEP
from kernels_pallas.native.runtime import joined, loop
from kernels_pallas.native.vectors import LANES, broadcast, dot_pairs, indices, larger, largest, number, splat

BATCH = 16          # queries
GROUP = 4           # of them, multiplied at once
WIDE = BLOCK        # head dimensions whose sums are in registers at once; the rest, if any, is DIM_STEP
NOTHING = -1e30     # finite, so that NOTHING - NOTHING is 0 and not NaN

# A query's state: where it begins in the chunk's queries and sums, and in those of the step; the end of what it sees;
# its highest score so far, the weights it has added up, and what sums so far are worth under a new highest score.
STATE_BYTES = 40
FIELDS = {
    "item": ("i64", 0), "place": ("i64", 8), "end": ("i64", 16), "top": ("float", 24), "total": ("float", 28),
    "keep": ("float", 32),
}
VECTOR = "<16 x float>"
REGISTERS = range(BLOCK // LANES)


def parts() -> str:
    """IR of @attend_scores, @attend_weights and @attend_sums."""
    return "\n".join([_scores(), _weights(), _sums()])


def field(name: str, query: str, i: str = "") -> str:
    """IR of %NAME_at{i}, where a query's state holds a field; `query` is its number."""
    _, byte = FIELDS[name]
    return f"""  %{name}_byte{i} = mul i64 {query}, {STATE_BYTES}
  %{name}_place{i} = add i64 %{name}_byte{i}, {byte}
  %{name}_at{i} = getelementptr i8, ptr %states, i64 %{name}_place{i}"""


def read(name: str, query: str, i: str = "") -> str:
    """IR of %NAME{i}, a field of a query's state."""
    kind, _ = FIELDS[name]
    return f"{field(name, query, i)}\n  %{name}{i} = load {kind}, ptr %{name}_at{i}"


def _group(of: str) -> str:
    """Numbers of the four queries from %first on, in the batch (%inI) and among all; past %count the last once more."""
    return joined([
        f"""  %far{i} = add i64 %first, {i}
  %in{i} = call i64 @llvm.smin.i64(i64 %far{i}, i64 %in_last)
  %number{i} = add i64 %query, %in{i}
{read("item", f"%number{i}", str(i))}
{of.format(i=i)}""" for i in range(GROUP)
    ])


def _scores() -> str:
    """@attend_scores: float32 [BATCH, BLOCK] products of %count queries, from %query on, and the keys."""
    stores = joined([
        f"  %to{i}_{r}_row = mul i64 %in{i}, {BLOCK}\n  %to{i}_{r}_item = add i64 %to{i}_{r}_row, {r * LANES}\n"
        f"  %to{i}_{r} = getelementptr float, ptr %scores, i64 %to{i}_{r}_item\n"
        f"  store {VECTOR} %pair_sum{i}_{r}, ptr %to{i}_{r}, align 64" for i in range(GROUP) for r in REGISTERS
    ])
    body = f"""{_group("  %q{i} = getelementptr bfloat, ptr %q, i64 %item{i}")}
{_products("pair", "%pairs", len(REGISTERS), "%keys", str(BLOCK), [f"%q{i}" for i in range(GROUP)], None, "first_loop")}
{stores}"""
    return f"""
define internal void @attend_scores(
  ptr noalias %q, ptr noalias %states, ptr noalias %keys, ptr noalias %scores, i64 %H, i64 %query, i64 %count
) noinline {{
entry:
  %in_last = sub i64 %count, 1
  %pairs = udiv i64 %H, 2
{loop("first", "0", "%count", GROUP, body, "entry")}
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


def _weights() -> str:
    """@attend_weights: scores to bfloat16 weights [BATCH, BLOCK] under each query's new highest score; its state.

    Says whether a highest score has risen, so that sums so far are worth less. Two loops over the queries: what is long
    in one query is a chain of instructions, and several of them run at once.
    """
    return f"""
define internal i1 @attend_weights(
  ptr noalias %states, ptr noalias %scores, ptr noalias %weights, i64 %query, i64 %count, i64 %at, i64 %window,
  float %scale_power
) noinline {{
entry:
  %falls = alloca [{BATCH} x float], align 64
  %keeps = alloca [{BATCH} x float], align 64
  store {VECTOR} zeroinitializer, ptr %falls, align 64
{broadcast("scales", "%scale_power")}
  %window_short = trunc i64 %window to i32
{broadcast("windows", "%window_short", "i32")}
{loop("n", "0", "%count", 1, _highest(), "entry")}
  %falls_all = load {VECTOR}, ptr %falls, align 64
  %keeps_all = call {VECTOR} @power({VECTOR} %falls_all)
  store {VECTOR} %keeps_all, ptr %keeps, align 64
{loop("m", "0", "%count", 1, _weigh(), "n_end")}
  %falls_bits = bitcast {VECTOR} %falls_all to <8 x i64>
  %falls_any = call i64 @llvm.vector.reduce.or.v8i64(<8 x i64> %falls_bits)
  %has_risen = icmp ne i64 %falls_any, 0
  ret i1 %has_risen
}}
"""


def _highest() -> str:
    """A query's scores, scaled, those that it does not see being NOTHING; its highest, and how far that has risen."""
    lines = []
    for r in REGISTERS:
        lines.append(
            f"  %from{r} = sub {indices([r * LANES + lane for lane in range(LANES)])}, %lows\n"
            f"  %seen{r} = icmp ult <16 x i32> %from{r}, %windows\n"
            f"  %raw{r}_item = add i64 %row, {r * LANES}\n"
            f"  %raw{r}_at = getelementptr float, ptr %scores, i64 %raw{r}_item\n"
            f"  %raw{r} = load {VECTOR}, ptr %raw{r}_at, align 64\n"
            f"  %scaled{r} = fmul {VECTOR} %raw{r}, %scales\n"
            f"  %masked{r} = select <16 x i1> %seen{r}, {VECTOR} %scaled{r}, {splat(NOTHING)}\n"
            + larger(f"score{r}", f"%masked{r}", splat(NOTHING).removeprefix(VECTOR + " "))    # NaN, too, is NOTHING
            + f"\n  store {VECTOR} %score{r}, ptr %raw{r}_at, align 64"
        )
    return f"""  %number = add i64 %query, %n
  %row = mul i64 %n, {BLOCK}
{joined([read("end", "%number"), read("top", "%number")])}
  %low_far = sub i64 %end, %window
  %low_in = sub i64 %low_far, %at
  %low = trunc i64 %low_in to i32
{broadcast("lows", "%low", "i32")}
{joined(lines)}
{larger("most_low", "%score0", "%score1")}
{larger("most_high", "%score2", "%score3")}
{larger("most", "%most_low", "%most_high")}
{largest("most_one", "%most")}
  %higher = fcmp ogt float %most_one, %top
  %top_new = select i1 %higher, float %most_one, float %top
  %fall = fsub float %top, %top_new
  %fall_at = getelementptr float, ptr %falls, i64 %n
  store float %fall, ptr %fall_at
  store float %top_new, ptr %top_at"""


def _weigh() -> str:
    """A query's weights, and what its sums and its weights so far are worth."""
    lines = []
    for r in REGISTERS:
        lines.append(
            f"  %weigh{r}_item = add i64 %weigh_row, {r * LANES}\n"
            f"  %weigh{r}_at = getelementptr float, ptr %scores, i64 %weigh{r}_item\n"
            f"  %of{r} = load {VECTOR}, ptr %weigh{r}_at, align 64\n"
            f"  %below{r} = fsub {VECTOR} %of{r}, %tops\n"
            f"  %weight{r} = call {VECTOR} @power_short({VECTOR} %below{r})\n"
            f"  %short{r} = fptrunc {VECTOR} %weight{r} to <16 x bfloat>\n"
            f"  %short{r}_at = getelementptr bfloat, ptr %weights, i64 %weigh{r}_item\n"
            f"  store <16 x bfloat> %short{r}, ptr %short{r}_at, align 32"
        )
    return f"""  %of_m = add i64 %query, %m
  %weigh_row = mul i64 %m, {BLOCK}
{joined([read("top", "%of_m", "_m"), read("total", "%of_m"), field("keep", "%of_m")])}
  %has_top = fcmp ogt float %top_m, {number(NOTHING)}
  %top_some = select i1 %has_top, float %top_m, float 0.0     ; NOTHING less this is far below all powers of two
{broadcast("tops", "%top_some")}
{joined(lines)}
  %sum_low = fadd {VECTOR} %weight0, %weight1
  %sum_high = fadd {VECTOR} %weight2, %weight3
  %sum = fadd {VECTOR} %sum_low, %sum_high
  %sum_one = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {VECTOR} %sum)
  %keep_from = getelementptr float, ptr %keeps, i64 %m
  %keep = load float, ptr %keep_from
  %total_kept = fmul float %total, %keep
  %total_new = fadd float %total_kept, %sum_one
  store float %total_new, ptr %total_at
  store float %keep, ptr %keep_at"""


def _sums() -> str:
    """@attend_sums: adds the weighted values of the block's first %pairs pairs of slots to the queries' sums."""
    group = _group(
        f"{read('keep', '%number{i}', '{i}')}\n{broadcast('keeps{i}', '%keep{i}')}\n"
        "  %out{i} = getelementptr float, ptr %out, i64 %item{i}\n"
        f"  %row{{i}} = mul i64 %in{{i}}, {BLOCK}\n"
        "  %weights{i} = getelementptr bfloat, ptr %weights, i64 %row{i}"
    )
    wide = loop("dim", "0", "%whole", WIDE, _dims("wide", WIDE, "%dim", "dim_loop"), "first_loop")
    body = f"""{group}
{wide}
  br i1 %has_rest, label %rest, label %done
rest:
{_dims("narrow", DIM_STEP, "%whole", "rest")}
  br label %done
done:"""
    return f"""
define internal void @attend_sums(
  ptr noalias %out, ptr noalias %states, ptr noalias %values, ptr noalias %weights, i64 %H, i64 %query, i64 %count,
  i64 %pairs, i1 %has_risen
) noinline {{
entry:
  %in_last = sub i64 %count, 1
  %whole = and i64 %H, {-WIDE}
  %has_rest = icmp slt i64 %whole, %H
{loop("first", "0", "%count", GROUP, body, "entry")}
  ret void
}}
"""


def _dims(name: str, width: int, dim: str, before: str) -> str:
    """Sums of `width` head dimensions from `dim` on; loaded first, all of them: a query may be there several times."""
    names = [(i, r) for i in range(GROUP) for r in range(width // LANES)]
    loads = [
        f"  %{name}_at{i}_{r}_item = add i64 {dim}, {r * LANES}\n"
        f"  %{name}_at{i}_{r} = getelementptr float, ptr %out{i}, i64 %{name}_at{i}_{r}_item\n"
        f"  %{name}_old{i}_{r} = load {VECTOR}, ptr %{name}_at{i}_{r}, align 4\n"
        f"  %{name}_kept{i}_{r} = fmul {VECTOR} %{name}_old{i}_{r}, %keeps{i}" for i, r in names
    ]
    stores = [f"  store {VECTOR} %{name}_sum{i}_{r}, ptr %{name}_at{i}_{r}, align 4" for i, r in names]
    products = _products(
        name, "%pairs", width // LANES, f"%{name}_values", "%H", [f"%weights{i}" for i in range(GROUP)],
        [f"%{name}_kept{i}_{r}" for i, r in names], before,
    )
    return joined([*loads, f"  %{name}_values = getelementptr i32, ptr %values, i64 {dim}", products, *stores])


def first_state(query: str, item: str, place: str, end: str, sink: str) -> str:
    """IR of a query's state before its first slot; a sink is a score without a value."""
    values = {"item": item, "place": place, "end": end, "top": "%top_first", "total": "%total_first"}
    return joined([
        f"""  %has_sink = fcmp ogt float {sink}, {number(NOTHING)}
  %top_first = select i1 %has_sink, float {sink}, float {number(NOTHING)}
  %total_first = select i1 %has_sink, float 1.0, float 0.0""",
        *(f"{field(name, query)}\n  store {FIELDS[name][0]} {value}, ptr %{name}_at" for name, value in values.items()),
    ])
