"""x / root(mean(x²) + epsilon) · (weight + offset), row by row: bfloat16 [T, D], computed in float32, rounded once.

Chunk: 32 rows. Traffic: x twice, the second time from the L1 cache; weight; the result once.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
Invariant: a row's result is the same beside any others.
"""

from __future__ import annotations

from kernels_pallas.native.runtime import RESULT_TABLE, arguments, joined, loaded, loop, of_thread, stored
from kernels_pallas.native.vectors import PAIRS

NAME = "jaxserve_rms_norm"
ROWS = 32               # of a chunk
STEP = PAIRS            # numbers of a row taken at once; widths are multiples
WIDE = f"<{STEP} x float>"
WORDS = [(name, "ptr") for name in ("x", "weight", "settings", "out")] + [(name, "i64") for name in ("T", "D")]


def kernel() -> str:
    """IR of the chunk, the setup, and a thread's nothing of its own."""
    return joined([_chunk(), _setup(), of_thread(NAME)])


def _wide(name: str, at: str, item: str) -> str:
    """IR of STEP float32 numbers %name, from bfloat16 at `at` from `item` on."""
    return f"""  %{name}_at = getelementptr bfloat, ptr {at}, i64 {item}
  %{name}_short = load <{STEP} x bfloat>, ptr %{name}_at, align 2
  %{name} = fpext <{STEP} x bfloat> %{name}_short to {WIDE}"""


def _spread(name: str, value: str) -> str:
    return f"""  %{name}_lane = insertelement {WIDE} poison, float {value}, i64 0
  %{name} = shufflevector {WIDE} %{name}_lane, {WIDE} poison, <{STEP} x i32> zeroinitializer"""


def _chunk() -> str:
    """@NAME_chunk."""
    squares = f"""  %sum = phi {WIDE} [zeroinitializer, %row_loop], [%sum_more, %i_more]
{_wide("some", "%row_at", "%i")}
  %square = fmul {WIDE} %some, %some
  %sum_more = fadd {WIDE} %sum, %square"""
    scaled = f"""{_wide("value", "%row_at", "%j")}
{_wide("factor", "%weight", "%j")}
  %factor_whole = fadd {WIDE} %factor, %offsets
  %normed = fmul {WIDE} %value, %scales
  %result = fmul {WIDE} %normed, %factor_whole
  %result_short = fptrunc {WIDE} %result to <{STEP} x bfloat>
  %to = getelementptr bfloat, ptr %out_at, i64 %j
  store <{STEP} x bfloat> %result_short, ptr %to, align 2"""
    body = f"""  %item = mul i64 %row, %D
  %row_at = getelementptr bfloat, ptr %x, i64 %item
  %out_at = getelementptr bfloat, ptr %out, i64 %item
{loop("i", "0", "%D", STEP, squares, "row_loop")}
  %sums = phi {WIDE} [zeroinitializer, %row_loop], [%sum_more, %i_more]
  %total = call reassoc float @llvm.vector.reduce.fadd.v{STEP}f32(float 0.0, {WIDE} %sums)
  %mean = fdiv float %total, %width
  %above = fadd float %mean, %epsilon
  %root = call float @llvm.sqrt.f32(float %above)
  %scale = fdiv float 1.0, %root
{_spread("scales", "%scale")}
{loop("j", "0", "%D", STEP, scaled, "i_end")}"""
    return f"""
declare float @llvm.sqrt.f32(float)
declare float @llvm.vector.reduce.fadd.v{STEP}f32(float, {WIDE})
define internal void @{NAME}_chunk(ptr %operands, i64 %chunk, ptr %own) {{
entry:
{loaded(WORDS)}
  %offset_at = getelementptr float, ptr %settings, i64 1
  %epsilon = load float, ptr %settings
  %offset = load float, ptr %offset_at
{_spread("offsets", "%offset")}
  %width = uitofp i64 %D to float
  %row_first = mul i64 %chunk, {ROWS}
  %row_far = add i64 %row_first, {ROWS}
  %row_stop = call i64 @llvm.smin.i64(i64 %row_far, i64 %T)
{loop("row", "%row_first", "%row_stop", 1, body, "entry")}
  ret void
}}
"""


def _setup() -> str:
    """@NAME_setup: arguments are x, weight, and float32 [epsilon, offset]."""
    return f"""
define internal i64 @{NAME}_setup(ptr %operands, ptr %frame) {{
{arguments(("x", "weight", "settings"))}
  %out_buffer = call ptr @buffer(ptr %frame, i64 {RESULT_TABLE}, i64 0)
  %out = call ptr @data(ptr %out_buffer)
  %T = call i64 @size(ptr %x_buffer, i64 0)
  %D = call i64 @size(ptr %x_buffer, i64 1)
{stored(WORDS)}
  %above = add i64 %T, {ROWS - 1}
  %chunks = udiv i64 %above, {ROWS}
  ret i64 %chunks
}}
"""
