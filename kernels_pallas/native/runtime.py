"""LLVM IR that every native kernel shares: XLA's call frame, and a loop over chunks on XLA's own threads.

A kernel brings `@NAME_setup(ptr %operands, ptr %frame)`, which says how many chunks there are, `@NAME_begin(operands)`,
`@NAME_chunk(operands, i64 %chunk, ptr %own)` and `@NAME_end(operands, own)`, and gets `@NAME`, which XLA calls.
Threads take chunks from one counter, the calling one too; one that got a chunk begins once, keeps what that gave as its
own, and ends. The caller then waits for chunks that others took. A helper that comes late finds nothing left, so no
thread ever waits for one that has not begun.

Source: xla/ffi/api/c_api.h of jaxlib 0.10 and 0.11 (offsets of C structs; the two agree on what is used here).
Invariant: a context is freed by the last who holds it, never while a helper may still look at it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

OPERANDS = 16       # 8-byte words that a kernel keeps in its context
# A context, in words, every counter in a cache line of its own: who holds it, the next chunk, chunks done, chunks.
_HOLDERS, _NEXT, _DONE, _CHUNKS, _OPERANDS = 0, 8, 16, 24, 32
_WORDS = _OPERANDS + OPERANDS

_API_FIELDS_BYTE = 48       # of XLA_FFI_Api, where its table of functions begins
_FIELD = re.compile(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);")
_VERSION = re.compile(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)")

DECLARATIONS = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare ptr @aligned_alloc(i64, i64)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare void @llvm.x86.sse2.pause()
"""

ARGUMENTS = """
; Data and dimensions of the frame's arguments and results.
define internal ptr @buffer(ptr %frame, i64 %table_byte, i64 %index) alwaysinline {
  %table_at = getelementptr i8, ptr %frame, i64 %table_byte
  %table = load ptr, ptr %table_at
  %at = getelementptr ptr, ptr %table, i64 %index
  %buffer = load ptr, ptr %at
  ret ptr %buffer
}
define internal ptr @data(ptr %buffer) alwaysinline {
  %at = getelementptr i8, ptr %buffer, i64 24
  %data = load ptr, ptr %at
  ret ptr %data
}
define internal i64 @size(ptr %buffer, i64 %axis) alwaysinline {
  %dims_at = getelementptr i8, ptr %buffer, i64 40
  %dims = load ptr, ptr %dims_at
  %at = getelementptr i64, ptr %dims, i64 %axis
  %size = load i64, ptr %at
  ret i64 %size
}
"""
ARGUMENT_TABLE, RESULT_TABLE = 72, 112      # bytes of the call frame


def header(path: Path) -> tuple[dict[str, int], tuple[int, int]]:
    """The byte of every function in XLA_FFI_Api, and the version (major, minor), as jaxlib's own header states them."""
    text = path.read_text()
    fields = _FIELD.findall(text)
    version = {name: int(number) for name, number in _VERSION.findall(text)}
    functions = {name: _API_FIELDS_BYTE + 8 * index for index, name in enumerate(fields)}
    return functions, (version["MAJOR"], version["MINOR"])


def loaded(words: list[tuple[str, str]], but: tuple[str, ...] = ()) -> str:
    """IR that reads a kernel's operands, (name, type) in order, from its context."""
    return "\n".join(
        f"  %{name}_word = getelementptr i64, ptr %operands, i64 {index}\n  %{name} = load {kind}, ptr %{name}_word"
        for index, (name, kind) in enumerate(words) if name not in but
    )


def stored(words: list[tuple[str, str]]) -> str:
    """IR that writes them there."""
    return "\n".join(
        f"  %{name}_to = getelementptr i64, ptr %operands, i64 {index}\n  store {kind} %{name}, ptr %{name}_to"
        for index, (name, kind) in enumerate(words)
    )


def arguments(names: Sequence[str]) -> str:
    """IR of %NAME_buffer and %NAME, where its data are, of the frame's arguments in order."""
    return "\n".join(
        f"  %{name}_buffer = call ptr @buffer(ptr %frame, i64 {ARGUMENT_TABLE}, i64 {index})\n"
        f"  %{name} = call ptr @data(ptr %{name}_buffer)" for index, name in enumerate(names)
    )


def of_thread(name: str, begin: str = "", end: str = "") -> str:
    """IR of @NAME_begin and @NAME_end of a kernel whose threads keep no memory of their own, but may do something."""
    return f"""
define internal ptr @{name}_begin(ptr %operands) {{
{begin}
  ret ptr null
}}
define internal void @{name}_end(ptr %operands, ptr %own) {{
{end}
  ret void
}}
"""


def joined(parts: list[str]) -> str:
    """Instructions one below the other."""
    return "\n".join(parts)


def loop(name: str, start: str, end: str, step: int | str, body: str, before: str) -> str:
    """A loop of %NAME from `start` while below `end`, entered from block `before`; goes on in block NAME_end."""
    return f"""  %{name}_some = icmp slt i64 {start}, {end}
  br i1 %{name}_some, label %{name}_loop, label %{name}_end
{name}_loop:
  %{name} = phi i64 [{start}, %{before}], [%{name}_next, %{name}_more]
{body}
  br label %{name}_more
{name}_more:
  %{name}_next = add i64 %{name}, {step}
  %{name}_again = icmp slt i64 %{name}_next, {end}
  br i1 %{name}_again, label %{name}_loop, label %{name}_end
{name}_end:"""


def handler(name: str, functions: dict[str, int], version: tuple[int, int]) -> str:
    """IR of `@NAME`: answers XLA's question for its version, then runs the chunks."""
    return _workers(name) + _entry(name, version) + _helpers(name, functions) + f"""
own:
  call void @{name}_work(ptr %context)
  br label %wait
wait:
  %finished = load atomic i64, ptr %done acquire, align 8
  %all = icmp sge i64 %finished, %chunks
  br i1 %all, label %end, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  br label %wait
end:
  call void @{name}_leave(ptr %context)
  ret ptr null
}}
"""


def _workers(name: str) -> str:
    """@NAME_work takes chunks until none is left, @NAME_leave lets go of the context, @NAME_help does both."""
    return f"""
define internal void @{name}_work(ptr %context) {{
entry:
  %next = getelementptr i64, ptr %context, i64 {_NEXT}
  %done = getelementptr i64, ptr %context, i64 {_DONE}
  %chunks_at = getelementptr i64, ptr %context, i64 {_CHUNKS}
  %operands = getelementptr i64, ptr %context, i64 {_OPERANDS}
  %chunks = load i64, ptr %chunks_at
  %first = atomicrmw add ptr %next, i64 1 acq_rel
  %any = icmp slt i64 %first, %chunks
  br i1 %any, label %begin, label %none
begin:
  %own = call ptr @{name}_begin(ptr %operands)
  br label %run
run:
  %chunk = phi i64 [%first, %begin], [%later, %run]
  call void @{name}_chunk(ptr %operands, i64 %chunk, ptr %own)
  %before = atomicrmw add ptr %done, i64 1 acq_rel
  %later = atomicrmw add ptr %next, i64 1 acq_rel
  %more = icmp slt i64 %later, %chunks
  br i1 %more, label %run, label %end
end:
  call void @{name}_end(ptr %operands, ptr %own)
  ret void
none:
  ret void
}}

define internal void @{name}_leave(ptr %context) {{
  %holders = getelementptr i64, ptr %context, i64 {_HOLDERS}
  %before = atomicrmw sub ptr %holders, i64 1 acq_rel
  %last = icmp eq i64 %before, 1
  br i1 %last, label %release, label %others
release:
  call void @free(ptr %context)
  ret void
others:
  ret void
}}

define void @{name}_help(ptr %context) {{
  call void @{name}_work(ptr %context)
  call void @{name}_leave(ptr %context)
  ret void
}}
"""


def _entry(name: str, version: tuple[int, int]) -> str:
    """The beginning of @NAME: XLA's question, else a context for this call."""
    return f"""
define ptr @{name}(ptr %frame) {{
entry:
  %extension_at = getelementptr i8, ptr %frame, i64 8
  %extension = load ptr, ptr %extension_at
  %asked = icmp ne ptr %extension, null
  br i1 %asked, label %tell, label %begin

tell:                                           ; XLA_FFI_Metadata_Extension: which version is spoken here
  %metadata_at = getelementptr i8, ptr %extension, i64 24
  %metadata = load ptr, ptr %metadata_at
  %major_at = getelementptr i8, ptr %metadata, i64 24
  %minor_at = getelementptr i8, ptr %metadata, i64 28
  store i32 {version[0]}, ptr %major_at
  store i32 {version[1]}, ptr %minor_at
  ret ptr null

begin:
  %context = call ptr @malloc(i64 {8 * _WORDS})
  %operands = getelementptr i64, ptr %context, i64 {_OPERANDS}
  %chunks = call i64 @{name}_setup(ptr %operands, ptr %frame)
  %next = getelementptr i64, ptr %context, i64 {_NEXT}
  %done = getelementptr i64, ptr %context, i64 {_DONE}
  %chunks_at = getelementptr i64, ptr %context, i64 {_CHUNKS}
  store i64 0, ptr %next
  store i64 0, ptr %done
  store i64 %chunks, ptr %chunks_at
"""


def _helpers(name: str, functions: dict[str, int]) -> str:
    """Asks XLA's thread pool to run @NAME_help, at most one a thread and a chunk less the caller's own."""
    return f"""
  %api_at = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api_at
  %xla_at = getelementptr i8, ptr %frame, i64 24
  %xla = load ptr, ptr %xla_at
  %threads_at = alloca i64
  store i64 1, ptr %threads_at
  %count = alloca [4 x i64]                     ; XLA_FFI_ThreadPool_NumThreads_Args
  %count_xla = getelementptr i64, ptr %count, i64 2
  %count_out = getelementptr i64, ptr %count, i64 3
  store i64 32, ptr %count
  %count_extension = getelementptr i64, ptr %count, i64 1
  store i64 0, ptr %count_extension
  store ptr %xla, ptr %count_xla
  store ptr %threads_at, ptr %count_out
  %num_threads_at = getelementptr i8, ptr %api, i64 {functions["ThreadPool_NumThreads"]}
  %num_threads = load ptr, ptr %num_threads_at
  %error = call ptr %num_threads(ptr %count)
  %threads = load i64, ptr %threads_at
  %useful = call i64 @llvm.smin.i64(i64 %threads, i64 %chunks)
  %helpers0 = sub i64 %useful, 1
  %helpers = call i64 @llvm.smax.i64(i64 %helpers0, i64 0)
  %holders = add i64 %helpers, 1
  %holders_at = getelementptr i64, ptr %context, i64 {_HOLDERS}
  store i64 %holders, ptr %holders_at

  %task = alloca [5 x i64]                      ; XLA_FFI_ThreadPool_Schedule_Args
  %task_extension = getelementptr i64, ptr %task, i64 1
  %task_xla = getelementptr i64, ptr %task, i64 2
  %task_function = getelementptr i64, ptr %task, i64 3
  %task_data = getelementptr i64, ptr %task, i64 4
  store i64 40, ptr %task
  store i64 0, ptr %task_extension
  store ptr %xla, ptr %task_xla
  store ptr @{name}_help, ptr %task_function
  store ptr %context, ptr %task_data
  %schedule_at = getelementptr i8, ptr %api, i64 {functions["ThreadPool_Schedule"]}
  %schedule = load ptr, ptr %schedule_at
  br label %ask
ask:
  %asked_for = phi i64 [0, %begin], [%one_more, %ask_one]
  %enough = icmp sge i64 %asked_for, %helpers
  br i1 %enough, label %own, label %ask_one
ask_one:
  %refused = call ptr %schedule(ptr %task)
  %one_more = add i64 %asked_for, 1
  br label %ask
"""
