"""Who of a chunk's items reads a block of context together: neighbours that keep it in the same pages.

Sequences with a common beginning (a system prompt) share its pages. Filling a block's buffers takes about as long as
what two queries do with it, so decode entries that lie side by side fill them once for all. Each run asks for the block
of the next: of the items after it, or at last for the first item's next block.
Invariant: an item meets the same blocks, in order, as it would alone.
"""

from __future__ import annotations

from kernels_pallas.native.blocks import BLOCK
from kernels_pallas.native.runtime import joined

# What a chunk notes of an item, in 8-byte words: its page table, its first query in the chunk and how many it has, the
# slots that some of them see, the end of what the first sees and the beginning of what the last does, whether they are
# of several tokens, and its number.
ITEM = {
    "table": ("ptr", 0), "query": ("i64", 1), "queries": ("i64", 2), "low": ("i64", 3), "high": ("i64", 4),
    "first_end": ("i64", 5), "last_low": ("i64", 6), "many": ("i64", 7), "number": ("i64", 8),
}
ITEM_WORDS = 16
SHARED = (
    "ptr %q, ptr %k, ptr %v, ptr %out, ptr %states, ptr %keys, ptr %values, ptr %scores, ptr %weights, i64 %S, i64 %M, "
    "i64 %H, i64 %page_step, i64 %head_step, i64 %at, i64 %window, float %scale_power"
)
RUN = SHARED + (
    ", ptr %table, i64 %low, i64 %high, i64 %first_end, i64 %last_low, i1 %is_many, i64 %query_first, i64 %query_stop, "
    "ptr %table_ahead, i64 %at_ahead"
)
BLOCK_OF_ITEMS = SHARED + ", ptr %items, i64 %item_count"


def parts() -> str:
    """IR of @attend_same, @attend_block and @attend_items."""
    return "\n".join([_same(), _runs(), _items()])


def _same() -> str:
    """@attend_same: whether two items keep the block at slot %at in the same pages."""
    return f"""
define internal i1 @attend_same(ptr %one, ptr %other, i64 %S, i64 %M, i64 %at) {{
entry:
  %at_last = add i64 %at, {BLOCK - 1}
  %page_first = udiv i64 %at, %S
  %page_far = udiv i64 %at_last, %S
  %table_last = sub i64 %M, 1
  %page_last = call i64 @llvm.smin.i64(i64 %page_far, i64 %table_last)
  br label %look
look:
  %index = phi i64 [%page_first, %entry], [%index_next, %same]
  %is_past = icmp sgt i64 %index, %page_last
  br i1 %is_past, label %yes, label %compare
compare:
  %one_at = getelementptr i32, ptr %one, i64 %index
  %other_at = getelementptr i32, ptr %other, i64 %index
  %one_page = load i32, ptr %one_at
  %other_page = load i32, ptr %other_at
  %is_same = icmp eq i32 %one_page, %other_page
  br i1 %is_same, label %same, label %no
same:
  %index_next = add i64 %index, 1
  br label %look
yes:
  ret i1 true
no:
  ret i1 false
}}
"""


def _item(name: str, of: str) -> str:
    """IR of what is noted of item number `of` (%NAME_table and so on) and whether it sees the block (%NAME_sees)."""
    fields = joined([
        f"  %{name}_{field}_at = getelementptr i64, ptr %{name}_item, i64 {word}\n"
        f"  %{name}_{field} = load {kind}, ptr %{name}_{field}_at" for field, (kind, word) in ITEM.items()
    ])
    return f"""  %{name}_item = getelementptr [{ITEM_WORDS} x i64], ptr %items, i64 {of}
{fields}
  %{name}_before_end = icmp slt i64 %at, %{name}_high
  %{name}_after_low = icmp sgt i64 %at_past, %{name}_low
  %{name}_sees = and i1 %{name}_before_end, %{name}_after_low"""


def _ahead() -> str:
    """IR of %table_ahead and %at_ahead: what the run before item %j asks for, that item's block or the first's next."""
    return f"""  %has_next = icmp slt i64 %j, %item_count
  %ahead = select i1 %has_next, i64 %j, i64 0
  %ahead_item = getelementptr [{ITEM_WORDS} x i64], ptr %items, i64 %ahead
  %ahead_table_at = getelementptr i64, ptr %ahead_item, i64 {ITEM["table"][1]}
  %table_ahead = load ptr, ptr %ahead_table_at
  %at_ahead = select i1 %has_next, i64 %at, i64 %at_past"""


def _runs() -> str:
    """@attend_block: a block for all items of a chunk, run by run: those one after the other that share its pages."""

    grown = {"low": "smin", "high": "smax", "first_end": "smin", "last_low": "smax"}
    first = joined([f"  %run_{name} = phi i64 [%i_{name}, %begin], [%grown_{name}, %take]" for name in grown])
    more = joined([
        f"  %grown_{name} = call i64 @llvm.{how}.i64(i64 %run_{name}, i64 %j_{name})" for name, how in grown.items()
    ])
    arguments = (
        RUN.replace("ptr %table,", "ptr %i_table,")
        .replace("i64 %query_first", "i64 %i_query").replace("i64 %query_stop", "i64 %run_stop")
    )
    for name in grown:
        arguments = arguments.replace(f"i64 %{name}", f"i64 %run_{name}")
    return f"""
define internal void @attend_block({BLOCK_OF_ITEMS}) noinline {{
entry:
  %at_past = add i64 %at, {BLOCK}
  br label %each
each:
  %i = phi i64 [0, %entry], [%i_next, %skip], [%j, %end_run]
  %some = icmp slt i64 %i, %item_count
  br i1 %some, label %look, label %exit
look:
{_item("i", "%i")}
  br i1 %i_sees, label %begin, label %skip
skip:
  %i_next = add i64 %i, 1
  br label %each
begin:
  %j_first = add i64 %i, 1
  %i_stop = add i64 %i_query, %i_queries
  br label %extend
extend:
  %j = phi i64 [%j_first, %begin], [%j_next, %take]
  %run_stop = phi i64 [%i_stop, %begin], [%grown_stop, %take]
  %run_many = phi i64 [%i_many, %begin], [1, %take]
{first}
  %has_more = icmp slt i64 %j, %item_count
  br i1 %has_more, label %candidate, label %end_run
candidate:
{_item("j", "%j")}
  br i1 %j_sees, label %compare, label %end_run
compare:
  %is_same = call i1 @attend_same(ptr %i_table, ptr %j_table, i64 %S, i64 %M, i64 %at)
  br i1 %is_same, label %take, label %end_run
take:
  %j_next = add i64 %j, 1
  %grown_stop = add i64 %run_stop, %j_queries
{more}
  br label %extend
end_run:
  %is_many = icmp ne i64 %run_many, 0
{_ahead()}
  call void @attend_run({arguments})
  br label %each
exit:
  ret void
}}
"""


def _arguments() -> str:
    """IR of %row, %position and %size of item number %item."""
    return joined([
        f"  %{name}_at = getelementptr i32, ptr %{name}s, i64 %item\n"
        f"  %{name}_short = load i32, ptr %{name}_at\n"
        f"  %{name} = sext i32 %{name}_short to i64" for name in ("row", "position", "size")
    ])


def _note() -> str:
    """IR that notes an item at %note."""
    values = {
        "table": "%table", "query": "%queries", "queries": "%size_queries", "low": "%low", "high": "%high",
        "first_end": "%first_end", "last_low": "%last_low", "many": "%many", "number": "%item",
    }
    return joined([
        f"  %{name}_to = getelementptr i64, ptr %note, i64 {ITEM[name][1]}\n"
        f"  store {ITEM[name][0]} {value}, ptr %{name}_to" for name, value in values.items()
    ])


def _items() -> str:
    """@attend_items: notes a chunk's items (those of size 0 are padding).

    Returns how many, their queries, the end of the slots that some see, and the first of them.
    """
    return f"""
define internal {{ i64, i64, i64, i64 }} @attend_items(
  ptr %pages, ptr %rows, ptr %positions, ptr %sizes, ptr %items, i64 %M, i64 %G, i64 %window, i64 %item_first,
  i64 %item_stop
) noinline {{
entry:
  br label %each
each:
  %item = phi i64 [%item_first, %entry], [%item_next, %next]
  %count = phi i64 [0, %entry], [%count_next, %next]
  %queries = phi i64 [0, %entry], [%queries_next, %next]
  %highest = phi i64 [0, %entry], [%highest_next, %next]
  %lowest = phi i64 [{1 << 62}, %entry], [%lowest_next, %next]
  %more = icmp slt i64 %item, %item_stop
  br i1 %more, label %look, label %exit
look:
{_arguments()}
  %is_item = icmp sgt i64 %size, 0
  br i1 %is_item, label %note_it, label %next
note_it:
  %note = getelementptr [{ITEM_WORDS} x i64], ptr %items, i64 %count
  %table_item = mul i64 %row, %M
  %table = getelementptr i32, ptr %pages, i64 %table_item
  %size_queries = mul i64 %size, %G
  %first_end = add i64 %position, 1
  %high = add i64 %position, %size              ; slots that some query sees: [low, high)
  %first_low = sub i64 %first_end, %window
  %low = call i64 @llvm.smax.i64(i64 %first_low, i64 0)
  %last_low = sub i64 %high, %window
  %is_many = icmp sgt i64 %size, 1
  %many = zext i1 %is_many to i64
{_note()}
  %count_more = add i64 %count, 1
  %queries_more = add i64 %queries, %size_queries
  %highest_more = call i64 @llvm.smax.i64(i64 %highest, i64 %high)
  %lowest_more = call i64 @llvm.smin.i64(i64 %lowest, i64 %low)
  br label %next
next:
  %count_next = phi i64 [%count, %look], [%count_more, %note_it]
  %queries_next = phi i64 [%queries, %look], [%queries_more, %note_it]
  %highest_next = phi i64 [%highest, %look], [%highest_more, %note_it]
  %lowest_next = phi i64 [%lowest, %look], [%lowest_more, %note_it]
  %item_next = add i64 %item, 1
  br label %each
exit:
  %r0 = insertvalue {{ i64, i64, i64, i64 }} poison, i64 %count, 0
  %r1 = insertvalue {{ i64, i64, i64, i64 }} %r0, i64 %queries, 1
  %r2 = insertvalue {{ i64, i64, i64, i64 }} %r1, i64 %highest, 2
  %r3 = insertvalue {{ i64, i64, i64, i64 }} %r2, i64 %lowest, 3
  ret {{ i64, i64, i64, i64 }} %r3
}}
"""
