"""A block of context slots, taken from its pages into two buffers that many queries read.

Keys: row p of the buffer holds the p-th pair of head dimensions of all 64 slots, 4 bytes a slot. Values: row p holds
slots 2 p and 2 p + 1 side by side, 4 bytes a head dimension.
Traffic: the block once, 2 x 64 x H numbers, while the next is asked for.
Work: four shuffles for 32 numbers of keys, one for 32 of values.
Invariant: a piece that nobody sees is neither read nor looked up; its values, like those of every slot that nobody
sees, are zero, and its keys are left as they were.
"""

from __future__ import annotations

from kernels_pallas.native.runtime import joined, loop
from kernels_pallas.native.vectors import LANES, PAIRS, indices, transposed

DIM_STEP = PAIRS    # head dimensions are multiples of it
PIECE = LANES       # slots that lie in one page: pages hold a multiple
BLOCK = 4 * PIECE
EXPONENT = 0x7F80   # a bfloat16 with all of these bits is not finite

ORDER = list(range(LANES))
DECLARATIONS = """
declare i1 @llvm.vector.reduce.or.v32i1(<32 x i1>)
"""


def parts() -> str:
    """IR of @attend_block_keys and @attend_block_values(SOURCE, buffer), and of @attend_is_finite(values, H)."""
    return "\n".join([DECLARATIONS, _keys(), _values(), _block_keys(), _block_values(), _is_finite()])


def _slot_pointers() -> str:
    """Where the 16 slots of a piece begin, from %from on, and what to ask for meanwhile, from %ahead on."""
    return joined([
        f"  %item{slot} = mul i64 %H, {slot}\n"
        f"  %slot{slot} = getelementptr bfloat, ptr %from, i64 %item{slot}\n"
        f"  %later{slot} = getelementptr bfloat, ptr %ahead, i64 %item{slot}" for slot in range(PIECE)
    ])


def _slot_loads(kind: str) -> str:
    """32 numbers of every slot, from %c on; pages lie anywhere, so no hardware guesses the next ones."""
    return joined([
        f"  %at{slot} = getelementptr bfloat, ptr %slot{slot}, i64 %c\n"
        f"  %of{slot} = load {kind}, ptr %at{slot}, align 2\n"
        f"  %later_at{slot} = getelementptr bfloat, ptr %later{slot}, i64 %c\n"
        f"  call void @llvm.prefetch.p0(ptr %later_at{slot}, i32 0, i32 2, i32 1)" for slot in range(PIECE)
    ])


def _keys() -> str:
    """@attend_keys: a piece's keys, transposed: pair p of all 16 slots at row p of the buffer."""
    lines, rows = transposed([f"%of{slot}" for slot in ORDER])
    stores = [
        f"  %to{pair} = getelementptr i32, ptr %to_first, i64 {pair * BLOCK}\n"
        f"  store <16 x i32> {rows[pair]}, ptr %to{pair}, align 64" for pair in range(LANES)
    ]
    body = joined([
        _slot_loads("<16 x i32>"), *lines, f"  %to_item = mul i64 %c, {BLOCK // 2}",
        "  %to_first = getelementptr i32, ptr %to, i64 %to_item", *stores,
    ])
    return f"""
define internal void @attend_keys(ptr %from, ptr %ahead, ptr noalias %to, i64 %H) noinline {{
entry:
{_slot_pointers()}
{loop("c", "0", "%H", PAIRS, body, "entry")}
  ret void
}}
"""


def _values() -> str:
    """@attend_values: a piece's values, two slots side by side; zero outside the slots [low, high) of the piece."""
    lines = [_slot_loads("<32 x i16>")]
    for slot in ORDER:
        lines.append(
            f"  %from_low{slot} = icmp sle i64 %low, {slot}\n  %to_high{slot} = icmp sgt i64 %high, {slot}\n"
            f"  %is_seen{slot} = and i1 %from_low{slot}, %to_high{slot}\n"
            f"  %kept{slot} = select i1 %is_seen{slot}, <32 x i16> %of{slot}, <32 x i16> zeroinitializer"
        )
    for pair in range(PIECE // 2):
        lines.append(f"  %item_pair{pair} = mul i64 %H, {pair}\n  %place{pair} = add i64 %item_pair{pair}, %c")
        for half in range(2):
            order = [side + half * LANES + lane for lane in ORDER for side in (0, PAIRS)]
            name = f"two{pair}_{half}"
            lines.append(
                f"  %{name} = shufflevector <32 x i16> %kept{2 * pair}, <32 x i16> %kept{2 * pair + 1}, "
                f"{indices(order)}\n"
                f"  %{name}_place = add i64 %place{pair}, {half * LANES}\n"
                f"  %{name}_to = getelementptr i32, ptr %to, i64 %{name}_place\n"
                f"  store <32 x i16> %{name}, ptr %{name}_to, align 64"
            )
    return f"""
define internal void @attend_values(ptr %from, ptr %ahead, ptr noalias %to, i64 %H, i64 %low, i64 %high) noinline {{
entry:
{_slot_pointers()}
{loop("c", "0", "%H", PAIRS, joined(lines), "entry")}
  ret void
}}
"""


# A block begins at slot %at of %table; the one that is filled after it at slot %at_ahead of %table_ahead.
SOURCE = (
    "ptr %pages, ptr %table, i64 %S, i64 %M, i64 %H, i64 %page_step, i64 %head_step, i64 %at, i64 %low, i64 %high, "
    "ptr %table_ahead, i64 %at_ahead"
)


def _page(when: str, at: str, table: str) -> str:
    """Where the piece at slot `at` of a table lies; past the table's end that of its last page."""
    return f"""  %page_far_{when} = udiv i64 {at}, %S
  %page_last_{when} = sub i64 %M, 1
  %page_index_{when} = call i64 @llvm.smin.i64(i64 %page_far_{when}, i64 %page_last_{when})
  %page_at_{when} = getelementptr i32, ptr {table}, i64 %page_index_{when}
  %page_short_{when} = load i32, ptr %page_at_{when}
  %page_{when} = sext i32 %page_short_{when} to i64
  %slot_in_page_{when} = urem i64 {at}, %S
  %slot_offset_{when} = mul i64 %slot_in_page_{when}, %H
  %page_item_{when} = mul i64 %page_{when}, %page_step
  %in_head_{when} = add i64 %page_item_{when}, %head_step
  %item_{when} = add i64 %in_head_{when}, %slot_offset_{when}
  %piece_{when} = getelementptr bfloat, ptr %pages, i64 %item_{when}"""


def _pieces(name: str, seen: str, unseen: str) -> str:
    """@NAME(SOURCE, to): the four pieces of the block at slot %at; those that nobody sees are not read."""
    body = f"""  %first = add i64 %at, %in_block
  %past = add i64 %first, {PIECE}
  %later = add i64 %at_ahead, %in_block
  %is_before_high = icmp slt i64 %first, %high
  %is_after_low = icmp sgt i64 %past, %low
  %is_seen = and i1 %is_before_high, %is_after_low
  br i1 %is_seen, label %seen, label %unseen
seen:
{_page("now", "%first", "%table")}
{_page("next", "%later", "%table_ahead")}
{seen}
  br label %done
unseen:
{unseen}
  br label %done
done:"""
    return f"""
define internal void @{name}({SOURCE}, ptr %to) noinline {{
entry:
{loop("in_block", "0", str(BLOCK), PIECE, body, "entry")}
  ret void
}}
"""


def _block_keys() -> str:
    return _pieces("attend_block_keys", """  %to_piece = getelementptr i32, ptr %to, i64 %in_block
  call void @attend_keys(ptr %piece_now, ptr %piece_next, ptr %to_piece, i64 %H)""", "")


def _block_values() -> str:
    """Pairs of slots are rows of the buffer; what nobody sees is zero."""
    to = """  %{0}_pair = udiv i64 %in_block, 2
  %{0}_item = mul i64 %{0}_pair, %H
  %{0} = getelementptr i32, ptr %to, i64 %{0}_item"""
    return _pieces("attend_block_values", f"""{to.format("to_piece")}
  %low_in = sub i64 %low, %first
  %high_in = sub i64 %high, %first
  call void @attend_values(ptr %piece_now, ptr %piece_next, ptr %to_piece, i64 %H, i64 %low_in, i64 %high_in)""",
                   f"""{to.format("to_zero")}
  %zero_bytes = mul i64 %H, {4 * PIECE // 2}
  call void @llvm.memset.p0.i64(ptr %to_zero, i8 0, i64 %zero_bytes, i1 false)""")


def _is_finite() -> str:
    """@attend_is_finite: whether no value of the block is NaN or infinite."""
    body = f"""  %found = phi <32 x i1> [zeroinitializer, %entry], [%found_more, %i_more]
  %at = getelementptr i32, ptr %values, i64 %i
  %two = load <32 x i16>, ptr %at, align 64
  %exponent = and <32 x i16> %two, splat (i16 {EXPONENT})
  %is_not = icmp eq <32 x i16> %exponent, splat (i16 {EXPONENT})
  %found_more = or <32 x i1> %found, %is_not"""
    return f"""
define internal i1 @attend_is_finite(ptr %values, i64 %H) noinline {{
entry:
  %count = mul i64 %H, {BLOCK // 2}
{loop("i", "0", "%count", LANES, body, "entry")}
  %all = phi <32 x i1> [zeroinitializer, %entry], [%found_more, %i_more]
  %some = call i1 @llvm.vector.reduce.or.v32i1(<32 x i1> %all)
  %none = xor i1 %some, true
  ret i1 %none
}}
"""
