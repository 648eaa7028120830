"""Attention over paged bfloat16 keys and values, for decode entries and for tiles of prompt tokens alike.

Item: consecutive query tokens of one sequence. Chunk: one item and one kv head; its (token, head) queries go by groups
of as many as the registers hold (4 of head dimension 64), which share every load of keys and values. A turn takes 16
context slots: 16 dot products a query (`vdpbf16ps`), one step of online softmax in float32 on a register of 16 scores
a query, then the weighted values.
Values are multiplied two slots at once, with weights rounded to bfloat16, as XLA's form rounds them.
Traffic: keys and values of an item's context once from memory, then from the L2 cache for each further group.
Invariant: a query's result comes of its own slots alone: what it may not see weighs nothing, whatever it holds, and
slots past the longest query of a group are not read as values at all.
"""

from __future__ import annotations

from kernels_pallas.native.runtime import ARGUMENT_TABLE, RESULT_TABLE, loaded, stored
from kernels_pallas.native.vectors import LANES, PAIRS, broadcast, dot_pairs, indices, lane_sums, number, splat

NAME = "jaxserve_attend"
QUERIES = {32: 4, 64: 4, 96: 2, 128: 2, 256: 1}     # of a group, by head dimension: sums fill 8 to 16 registers
TURN = LANES        # context slots of a turn; pages hold a multiple
NOTHING = -1e30     # finite, so that NOTHING - NOTHING is 0 and not NaN

POINTERS = ("q", "k", "v", "pages", "tokens", "rows", "positions", "sizes", "settings", "scale", "sinks", "out")
WORDS = [(name, "ptr") for name in POINTERS] + [("K", "i64")]
GROUP = (
    "ptr %q, ptr %k, ptr %v, ptr %table, ptr %out, i64 %N, i64 %G, i64 %S, i64 %M, i64 %page_step, i64 %head_step, "
    "i64 %head_first, i64 %token, i64 %position, i64 %query, i64 %queries, i64 %window, float %scale_power, ptr %sinks"
)


def kernel() -> str:
    """IR of a group for every head dimension, the chunk, and the setup."""
    return "\n".join([*(_group(dim, count) for dim, count in QUERIES.items()), _chunk(), _setup()])


def _phi(name: str, sources: str, kind: str = "<16 x float>") -> str:
    return f"  %{name} = phi {kind} {sources}"


def _state(top: str, total: str, sum_: str, count: int, sums: list[str]) -> str:
    """Maximum, denominator and sums of every query, before the first slot or after a turn."""
    return _lines([
        *(_phi(f"{top}{i}", f"[%top_first{i}, %entry], [%top_new{i}, %turn_end]", "float") for i in range(count)),
        *(_phi(f"{total}{i}", f"[%total_first{i}, %entry], [%total_new{i}, %turn_end]", "float") for i in range(count)),
        *(_phi(f"{sum_}{j}", f"[zeroinitializer, %entry], [%added{j}, %turn_end]") for j in sums),
    ])


def _lines(parts: list[str]) -> str:
    return "\n".join(parts)


def _group(dim: int, count: int) -> str:
    """@group_H: `count` queries from number %query on; numbers past the last are computed once more."""
    each, registers = range(count), range(dim // LANES)
    sums = [f"{i}_{c}" for i in each for c in registers]
    return f"""
define internal void @group_{dim}({GROUP}) noinline {{
entry:
  %query_last = sub i64 %queries, 1
{_lines([_query(i, dim) for i in each])}
{_extreme("begin", "smin", count)}
{_extreme("end", "smax", count)}
{_extreme("begin_last", "smax", count, of="begin")}
{_extreme("end_first", "smin", count, of="end")}
  %first_turn = and i64 %begin, {-TURN}
{broadcast("scales", "%scale_power")}
  %some = icmp slt i64 %first_turn, %end
  br i1 %some, label %turn, label %finish

turn:
  %at = phi i64 [%first_turn, %entry], [%at_next, %turn_end]
{_state("top", "total", "sum", count, sums)}
  %at_next = add i64 %at, {TURN}
{_page("now", "%at", dim)}
{_page("next", "%at_next", dim)}
{_ahead(dim)}
{_lines([_scores(i, dim) for i in each])}
{_any_raised(count)}
  br i1 %is_raised, label %rescale, label %weigh
rescale:                                        ; a higher score than any before: what was summed weighs less
{_lines([_rescaled(i, dim) for i in each])}
  br label %weigh
weigh:
{_lines([_phi(f"kept{j}", f"[%sum{j}, %turn], [%less{j}, %rescale]") for j in sums])}
{_lines([_phi(f"total_kept{i}", f"[%total{i}, %turn], [%total_less{i}, %rescale]", "float") for i in each])}
{_lines([_weights(i) for i in each])}
  %is_begun = icmp sge i64 %at, %begin_last
  %is_before_end = icmp sle i64 %at_next, %end_first
  %is_full = and i1 %is_begun, %is_before_end
  br i1 %is_full, label %full, label %edge

full:                                           ; all queries see all slots
{_full_turn(dim, count)}
  br label %turn_end

edge:                                           ; some see less: to them the others are zero, whatever they hold
{_edge_turn(dim, count)}
  br label %turn_end

turn_end:
{_lines([_phi(f"added{j}", f"[%full{j}, %full], [%edge{j}, %edge]") for j in sums])}
  %again = icmp slt i64 %at_next, %end
  br i1 %again, label %turn, label %finish

finish:
{_state("highest", "all", "whole", count, sums)}
{_lines([_finish(i, dim) for i in each])}
  ret void
}}
"""


def _query(i: int, dim: int) -> str:
    """Where query i of the group lies, what it sees, its numbers, and its state before the first slot."""
    loads = _lines([
        f"  %q{i}_{c}_at = getelementptr bfloat, ptr %q{i}_row, i64 {c * PAIRS}\n"
        f"  %q{i}_{c} = load <32 x bfloat>, ptr %q{i}_{c}_at, align 2" for c in range(dim // PAIRS)
    ])
    return f"""  %number{i}_far = add i64 %query, {i}
  %number{i} = call i64 @llvm.smin.i64(i64 %number{i}_far, i64 %query_last)
  %later{i} = udiv i64 %number{i}, %G
  %of_group{i} = urem i64 %number{i}, %G
  %head{i} = add i64 %head_first, %of_group{i}
  %token{i} = add i64 %token, %later{i}
  %token_heads{i} = mul i64 %token{i}, %N
  %row{i} = add i64 %token_heads{i}, %head{i}
  %item{i} = mul i64 %row{i}, {dim}
  %q{i}_row = getelementptr bfloat, ptr %q, i64 %item{i}
{loads}
  %position{i} = add i64 %position, %later{i}
  %end{i} = add i64 %position{i}, 1
  %past{i} = sub i64 %end{i}, %window
  %begin{i} = call i64 @llvm.smax.i64(i64 %past{i}, i64 0)
  %sink{i}_at = getelementptr float, ptr %sinks, i64 %head{i}
  %sink{i} = load float, ptr %sink{i}_at
  %has_sink{i} = fcmp ogt float %sink{i}, {number(NOTHING)}
  %top_first{i} = select i1 %has_sink{i}, float %sink{i}, float {number(NOTHING)}
  %total_first{i} = select i1 %has_sink{i}, float 1.0, float 0.0"""


def _extreme(name: str, function: str, count: int, of: str | None = None) -> str:
    """The least or greatest of the queries' %begin or %end, as %name."""
    of = of or name
    lines, before = [], f"%{of}0"
    for i in range(1, count):
        after = f"%{name}" if i == count - 1 else f"%{name}_{function}{i}"
        lines.append(f"  {after} = call i64 @llvm.{function}.i64(i64 {before}, i64 %{of}{i})")
        before = after
    return _lines(lines) if lines else f"  %{name} = add i64 %{of}0, 0"


def _page(when: str, at: str, dim: int) -> str:
    """Keys and values of the 16 slots from `at` on; past the table's end those of its last page."""
    return f"""  %page_far_{when} = udiv i64 {at}, %S
  %page_last_{when} = sub i64 %M, 1
  %page_index_{when} = call i64 @llvm.smin.i64(i64 %page_far_{when}, i64 %page_last_{when})
  %page_at_{when} = getelementptr i32, ptr %table, i64 %page_index_{when}
  %page_short_{when} = load i32, ptr %page_at_{when}
  %page_{when} = sext i32 %page_short_{when} to i64
  %slot_in_page_{when} = urem i64 {at}, %S
  %slot_offset_{when} = mul i64 %slot_in_page_{when}, {dim}
  %page_item_{when} = mul i64 %page_{when}, %page_step
  %in_head_{when} = add i64 %page_item_{when}, %head_step
  %kv_item_{when} = add i64 %in_head_{when}, %slot_offset_{when}
  %keys_{when} = getelementptr bfloat, ptr %k, i64 %kv_item_{when}
  %values_{when} = getelementptr bfloat, ptr %v, i64 %kv_item_{when}"""


def _ahead(dim: int) -> str:
    """Asks for the next turn's slots: pages lie anywhere, so no hardware guesses them."""
    return _lines([
        f"  %ahead_{of}{line} = getelementptr bfloat, ptr %{of}_next, i64 {line * PAIRS}\n"
        f"  call void @llvm.prefetch.p0(ptr %ahead_{of}{line}, i32 0, i32 2, i32 1)"
        for of in ("keys", "values") for line in range(TURN * dim // PAIRS)
    ])


def _scores(i: int, dim: int) -> str:
    """Scores of query i (NOTHING where it does not see), and its new maximum."""
    scores = []
    for slot in range(TURN):
        before = splat(0.0)
        for c in range(dim // PAIRS):
            name = f"k{i}_{slot}_{c}"
            scores.append(
                f"  %{name}_at = getelementptr bfloat, ptr %keys_now, i64 {slot * dim + c * PAIRS}\n"
                f"  %{name} = load <32 x bfloat>, ptr %{name}_at, align 2\n"
                f"  %dot{i}_{slot}_{c} = {dot_pairs(before, f'%q{i}_{c}', f'%{name}')}"
            )
            before = f"<16 x float> %dot{i}_{slot}_{c}"
    adding, total = lane_sums([f"%dot{i}_{slot}_{dim // PAIRS - 1}" for slot in range(TURN)], f"fold{i}_")
    return f"""{_lines(scores)}
{adding}
  %scaled{i} = fmul <16 x float> {total}, %scales
  %low{i}_far = sub i64 %begin{i}, %at
  %low{i} = trunc i64 %low{i}_far to i32
  %high{i}_far = sub i64 %end{i}, %at
  %high{i} = trunc i64 %high{i}_far to i32
{broadcast(f"lows{i}", f"%low{i}", "i32")}
{broadcast(f"highs{i}", f"%high{i}", "i32")}
  %from{i} = icmp sge {indices(list(range(TURN)))}, %lows{i}
  %until{i} = icmp slt {indices(list(range(TURN)))}, %highs{i}
  %seen{i} = and <16 x i1> %from{i}, %until{i}
  %score{i} = select <16 x i1> %seen{i}, <16 x float> %scaled{i}, {splat(NOTHING)}
  %most{i} = call float @llvm.vector.reduce.fmax.v16f32(<16 x float> %score{i})
  %higher{i} = fcmp ogt float %most{i}, %top{i}
  %top_new{i} = select i1 %higher{i}, float %most{i}, float %top{i}"""


def _any_raised(count: int) -> str:
    lines, before = ["  %raised0 = or i1 %higher0, false"], "%raised0"
    for i in range(1, count):
        lines.append(f"  %raised{i} = or i1 {before}, %higher{i}")
        before = f"%raised{i}"
    return _lines([*lines, f"  %is_raised = or i1 {before}, false"])


def _rescaled(i: int, dim: int) -> str:
    """What query i has summed so far, under its new maximum; where that is the old one, bit for bit as it was."""
    return f"""{broadcast(f"olds{i}", f"%top{i}")}
{broadcast(f"news{i}", f"%top_new{i}")}
  %fall{i} = fsub <16 x float> %olds{i}, %news{i}
  %keep{i} = call <16 x float> @power(<16 x float> %fall{i})
  %keep_one{i} = extractelement <16 x float> %keep{i}, i64 0
  %total_less{i} = fmul float %total{i}, %keep_one{i}
{_lines([f"  %less{i}_{c} = fmul <16 x float> %sum{i}_{c}, %keep{i}" for c in range(dim // LANES)])}"""


def _weights(i: int) -> str:
    """The slots' weights of query i: added up in float32, and rounded to bfloat16 for the products with values."""
    return f"""{broadcast(f"tops{i}", f"%top_new{i}")}
  %below{i} = fsub <16 x float> %score{i}, %tops{i}
  %power{i} = call <16 x float> @power(<16 x float> %below{i})
  %weight{i} = select <16 x i1> %seen{i}, <16 x float> %power{i}, <16 x float> zeroinitializer
  %turn_total{i} = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %weight{i})
  %total_new{i} = fadd float %total_kept{i}, %turn_total{i}
  %short{i} = fptrunc <16 x float> %weight{i} to <16 x bfloat>
  %pairs{i} = bitcast <16 x bfloat> %short{i} to <8 x i32>"""


def _share(where: str, i: int, pair: int) -> str:
    """The weights of two neighbouring slots for query i, in every lane."""
    return (
        f"  %{where}_share{i}_{pair}_lanes = shufflevector <8 x i32> %pairs{i}, <8 x i32> poison, "
        f"{indices([pair] * LANES)}\n"
        f"  %{where}_share{i}_{pair} = bitcast <16 x i32> %{where}_share{i}_{pair}_lanes to <32 x bfloat>"
    )


def _interleaved(name: str, first: str, second: str) -> str:
    """Numbers of two slots side by side, in two registers: of every 8, the lower and the upper 4 (`vpunpck`)."""
    halves = []
    for half, offset in (("low", 0), ("high", 4)):
        starts = [group + offset + at for group in range(0, PAIRS, 8) for at in range(4)]
        order = [lane for start in starts for lane in (start, PAIRS + start)]
        halves.append(
            f"  %{name}_{half}_bits = shufflevector <32 x i16> {first}, <32 x i16> {second}, {indices(order)}\n"
            f"  %{name}_{half} = bitcast <32 x i16> %{name}_{half}_bits to <32 x bfloat>"
        )
    return _lines(halves)


def _values(where: str, slot: int, c: int, dim: int) -> str:
    name = f"{where}_v{slot}_{c}"
    return (
        f"  %{name}_at = getelementptr bfloat, ptr %values_now, i64 {slot * dim + c * PAIRS}\n"
        f"  %{name} = load <32 x i16>, ptr %{name}_at, align 2"
    )


def _added(where: str, i: int, pair: int, c: int, values: str) -> list[str]:
    """Adds two slots' values to two of query i's sums."""
    lines = []
    for half, name in enumerate(("low", "high")):
        register = 2 * c + half
        before = f"%{where}{i}_{register}_{pair - 1}" if pair else f"%kept{i}_{register}"
        after = f"{where}{i}_{register}" if pair == TURN // 2 - 1 else f"{where}{i}_{register}_{pair}"
        product = dot_pairs(f"<16 x float> {before}", f"%{values}_{name}", f"%{where}_share{i}_{pair}")
        lines.append(f"  %{after} = {product}")
    return lines


def _full_turn(dim: int, count: int) -> str:
    """Values of all 16 slots, two by two: each register of them is used by every query."""
    lines = []
    for pair in range(TURN // 2):
        lines += [_share("full", i, pair) for i in range(count)]
        for c in range(dim // PAIRS):
            first, second = 2 * pair, 2 * pair + 1
            lines += [_values("full", slot, c, dim) for slot in (first, second)]
            lines.append(_interleaved(f"full{pair}_{c}", f"%full_v{first}_{c}", f"%full_v{second}_{c}"))
            for i in range(count):
                lines += _added("full", i, pair, c, f"full{pair}_{c}")
    return _lines(lines)


def _edge_turn(dim: int, count: int) -> str:
    """The same additions, with zeros for what a query does not see: 0 x NaN is NaN."""
    lines = []
    for pair in range(TURN // 2):
        first, second = 2 * pair, 2 * pair + 1
        lines += [_share("edge", i, pair) for i in range(count)]
        for c in range(dim // PAIRS):
            lines += [_values("edge", slot, c, dim) for slot in (first, second)]
            for i in range(count):
                for slot in (first, second):
                    name = f"edge{i}_of{slot}_{c}"
                    lines.append(
                        f"  %{name}_seen = extractelement <16 x i1> %seen{i}, i64 {slot}\n"
                        f"  %{name} = select i1 %{name}_seen, <32 x i16> %edge_v{slot}_{c}, <32 x i16> zeroinitializer"
                    )
                lines.append(_interleaved(
                    f"edge{i}_{pair}_{c}_two", f"%edge{i}_of{first}_{c}", f"%edge{i}_of{second}_{c}"
                ))
                lines += _added("edge", i, pair, c, f"edge{i}_{pair}_{c}_two")
    return _lines(lines)


def _finish(i: int, dim: int) -> str:
    """Divides by the denominator (nothing seen gives zero), puts the lanes back in order, and stores."""
    stores = []
    for c in range(dim // LANES):
        low, high = f"%mean{i}_{c - c % 2}", f"%mean{i}_{c - c % 2 + 1}"
        half = (c % 2) * (LANES // 2)
        order = [side + half + group + at for group in (0, 4) for side in (0, LANES) for at in range(4)]
        stores.append(
            f"  %ordered{i}_{c} = shufflevector <16 x float> {low}, <16 x float> {high}, {indices(order)}\n"
            f"  %out{i}_{c} = getelementptr float, ptr %out{i}_row, i64 {c * LANES}\n"
            f"  store <16 x float> %ordered{i}_{c}, ptr %out{i}_{c}, align 4"
        )
    means = [f"  %mean{i}_{c} = fmul <16 x float> %whole{i}_{c}, %parts{i}" for c in range(dim // LANES)]
    return f"""  %empty{i} = fcmp oeq float %all{i}, 0.0
  %divisor{i} = select i1 %empty{i}, float 1.0, float %all{i}
  %part{i} = fdiv float 1.0, %divisor{i}
{broadcast(f"parts{i}", f"%part{i}")}
  %out{i}_row = getelementptr float, ptr %out, i64 %item{i}
{_lines([*means, *stores])}"""


def _chunk() -> str:
    """@NAME_chunk: chunk = item * K + kv head; items of size 0 are padding."""
    of_item = _lines([
        f"  %{name}_at = getelementptr i32, ptr %{name}s, i64 %item\n"
        f"  %{name}_short = load i32, ptr %{name}_at\n"
        f"  %{name} = sext i32 %{name}_short to i64" for name in ("token", "row", "position", "size")
    ])
    settings = _lines([
        f"  %{name}_at = getelementptr i32, ptr %settings, i64 {index}\n"
        f"  %{name}_short = load i32, ptr %{name}_at\n"
        f"  %{name} = sext i32 %{name}_short to i64" for index, name in enumerate(("window", "N", "S", "M", "H"))
    ])
    cases = " ".join(f"i64 {dim}, label %dim{dim}" for dim in QUERIES)
    calls = _lines([
        f"dim{dim}:\n  call void @group_{dim}({GROUP})\n  %query{dim} = add i64 %query, {count}\n  br label %group_end"
        for dim, count in QUERIES.items()
    ])
    nexts = ", ".join(f"[%query{dim}, %dim{dim}]" for dim in QUERIES)
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
  %scale_power = load float, ptr %scale
  br label %group
group:
  %query = phi i64 [0, %begin], [%query_next, %group_end]
  switch i64 %H, label %exit [{cases}]
{calls}
group_end:
  %query_next = phi i64 {nexts}
  %more = icmp slt i64 %query_next, %queries
  br i1 %more, label %group, label %exit
exit:
  ret void
}}
"""


def _setup() -> str:
    """@NAME_setup: fills the operands from the frame; items * K chunks."""
    arguments = _lines([
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
