"""x · weightᵀ by the tile registers of AMX: 16 outputs x 16 tokens a register, over steps of 64 bytes of a row.

A tile of weights is 64 bytes of 16 rows as checkpoints store them; a tile of x holds 4 bytes (two bfloat16, four int8) of
16 tokens side by side, so x is put into that order first (`pack`), once a product. A block is up to 2 tiles of outputs x 2 of
tokens: four loads feed four multiplications of 16 x 16 x 32 numbers. Sums are turned when they are stored.
Traffic: the weights once from memory; x from the L2 cache for every 32 outputs.
Work: 512 multiplications of bfloat16 a cycle and core, 16 times what a 512-bit register gives.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (tile configuration), and volume 2
(TDPBF16PS, TDPBSSD).
Invariant: a sum is made by the same additions in the same order whatever the other rows are, and however many.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from kernels_pallas.native.runtime import joined, loop
from kernels_pallas.native.vectors import LANES, transposed

SIDE = 16               # rows of a tile, and its columns of 4 bytes
STEP_BYTES = 64         # of a row, in a tile
TILE_BYTES = SIDE * STEP_BYTES
UNIT = 2 * SIDE         # outputs of a block
ARGUMENTS = "ptr %x, ptr %weight, ptr %out, i64 %T, i64 %O, i64 %I, i64 %begin, i64 %end"
_WEIGHTS, _TOKENS = (4, 5), (6, 7)      # tile registers; sums are in the first four
_SHAPES = tuple(product((1, 2), (1, 2)))

_PALETTE = [1, 0, *[0] * 14, *[STEP_BYTES, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8]
DECLARATIONS = f"""
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare void @llvm.x86.tdpbssd(i8, i8, i8)
@tile_shapes = internal constant [64 x i8] [{", ".join(f"i8 {byte}" for byte in _PALETTE)}], align 64
"""
CONFIGURE = "  call void @llvm.x86.ldtilecfg(ptr @tile_shapes)"     # all eight, whole; per thread, until RELEASE
RELEASE = "  call void @llvm.x86.tilerelease()"


@dataclass(frozen=True, slots=True)
class TileKind:
    """What tiles hold, and the multiplication that takes it."""

    name: str
    multiply: str


BFLOAT16 = TileKind("bf16", "tdpbf16ps")
INT8 = TileKind("i8", "tdpbssd")


def shared() -> str:
    """IR of what all kernels use: @tile_pack, @tile_store and @tile_store_rounded, and the blocks of both kinds."""
    parts = [DECLARATIONS, _pack(), _store(rounds=False), _store(rounds=True)]
    return "\n".join(parts + [_block(kind, *shape) for kind in (BFLOAT16, INT8) for shape in _SHAPES])


def load(register: int, at: str, stride: str) -> str:
    return f"  call void @llvm.x86.tileloadd64(i8 {register}, ptr {at}, i64 {stride})"


def store(register: int, at: str, stride: str) -> str:
    return f"  call void @llvm.x86.tilestored64(i8 {register}, ptr {at}, i64 {stride})"


def zero(register: int) -> str:
    return f"  call void @llvm.x86.tilezero(i8 {register})"


def multiply(kind: TileKind, sums: int, first: int, second: int) -> str:
    return f"  call void @llvm.x86.{kind.multiply}(i8 {sums}, i8 {first}, i8 {second})"


def rounded(i: str, register: str) -> str:
    """IR that stores float32 `register` (of type <16 x i32>) at %toI as bfloat16."""
    return (
        f"  %long{i} = bitcast <16 x i32> {register} to <16 x float>\n"
        f"  %short{i} = fptrunc <16 x float> %long{i} to <16 x bfloat>\n"
        f"  store <16 x bfloat> %short{i}, ptr %to{i}, align 2"
    )


def _pack() -> str:
    """@tile_pack(x, T, bytes of a row): x in tiles, those of 16 tokens one after the other; who calls frees it.

    Tokens past the last are the last once more.
    """
    rows = joined([
        f"  %row{r}_far = add i64 %token, {r}\n"
        f"  %row{r} = call i64 @llvm.smin.i64(i64 %row{r}_far, i64 %last)\n"
        f"  %row{r}_byte = mul i64 %row{r}, %row_bytes\n"
        f"  %row{r}_at = getelementptr i8, ptr %x, i64 %row{r}_byte" for r in range(SIDE)
    ])
    loads = joined([
        f"  %now{r} = getelementptr i8, ptr %row{r}_at, i64 %byte\n"
        f"  %of{r} = load <16 x i32>, ptr %now{r}, align 1" for r in range(SIDE)
    ])
    lines, turned = transposed([f"%of{r}" for r in range(SIDE)])
    stores = joined([
        f"  %to{p} = getelementptr i8, ptr %tile, i64 {STEP_BYTES * p}\n"
        f"  store <16 x i32> {turned[p]}, ptr %to{p}, align 64" for p in range(LANES)
    ])
    step = f"""{loads}
{joined(lines)}
  %in_row = mul i64 %byte, {SIDE}
  %tile = getelementptr i8, ptr %to, i64 %in_row
{stores}"""
    body = f"""{rows}
  %before = mul i64 %token, %row_bytes
  %to = getelementptr i8, ptr %packed, i64 %before
{loop("byte", "0", "%row_bytes", STEP_BYTES, step, "token_loop")}"""
    return f"""
define internal ptr @tile_pack(ptr %x, i64 %T, i64 %row_bytes) noinline {{
entry:
  %last = sub i64 %T, 1
  %above = add i64 %T, {SIDE - 1}
  %whole = and i64 %above, {-SIDE}
  %bytes = mul i64 %whole, %row_bytes
  %packed = call ptr @aligned_alloc(i64 64, i64 %bytes)
{loop("token", "0", "%T", SIDE, body, "entry")}
  ret ptr %packed
}}
"""


def _store(*, rounds: bool) -> str:
    """@tile_store(sums, out, T, bytes of a result's row, first token, byte in it): 16 outputs of up to 16 tokens.

    The other form rounds float32 to bfloat16.

    Tokens past the last hold what the last holds, and are stored there first.
    """
    loads = joined([
        f"  %at{r} = getelementptr i8, ptr %sums, i64 {STEP_BYTES * r}\n"
        f"  %of{r} = load <16 x i32>, ptr %at{r}, align 64" for r in range(SIDE)
    ])
    lines, turned = transposed([f"%of{r}" for r in range(SIDE)])
    stores = joined([
        f"  %token{t}_far = add i64 %token, {t}\n"
        f"  %token{t} = call i64 @llvm.smin.i64(i64 %token{t}_far, i64 %last)\n"
        f"  %row{t} = mul i64 %token{t}, %out_bytes\n"
        f"  %byte{t} = add i64 %row{t}, %byte\n"
        f"  %to{t} = getelementptr i8, ptr %out, i64 %byte{t}\n" + (rounded(str(t), turned[t]) if rounds else f"  store <16 x i32> {turned[t]}, ptr %to{t}, align 4")
        for t in reversed(range(LANES))
    ])
    return f"""
define internal void @tile_store{"_rounded" if rounds else ""}(ptr %sums, ptr %out, i64 %T, i64 %out_bytes, i64 %token, i64 %byte) noinline {{
  %last = sub i64 %T, 1
{loads}
{joined(lines)}
{stores}
  ret void
}}
"""


def _block(kind: TileKind, weights: int, tokens: int) -> str:
    """@KIND_tiles_WxT(x, W weights, sums, bytes of a row), for 1 and 2 tiles of weights and of tokens.

    x points to the first of its tokens' tiles, a weight to the first of its 16 rows; `sums` gets whole tiles, in order
    of weights, then tokens.
    """
    pairs = list(product(range(weights), range(tokens)))
    loads = [
        f"  %now{w} = getelementptr i8, ptr %weight{w}, i64 %byte\n" + load(_WEIGHTS[w], f"%now{w}", "%row_bytes")
        for w in range(weights)
    ] + [
        f"  %tile{t} = getelementptr i8, ptr %tokens{t}, i64 %in_row\n" + load(_TOKENS[t], f"%tile{t}", str(STEP_BYTES))
        for t in range(tokens)
    ]
    sums = [multiply(kind, w * tokens + t, _WEIGHTS[w], _TOKENS[t]) for w, t in pairs]
    body = joined([f"  %in_row = mul i64 %byte, {SIDE}", *loads, *sums])
    starts = joined([
        f"  %before{t} = mul i64 %row_bytes, {SIDE * t}\n  %tokens{t} = getelementptr i8, ptr %x, i64 %before{t}"
        for t in range(tokens)
    ] + [zero(w * tokens + t) for w, t in pairs])
    stores = joined([
        f"  %sum{i} = getelementptr i8, ptr %sums, i64 {TILE_BYTES * i}\n" + store(i, f"%sum{i}", str(STEP_BYTES))
        for i in range(len(pairs))
    ])
    return f"""
define internal void @{kind.name}_tiles_{weights}x{tokens}(
  ptr %x, {", ".join(f"ptr %weight{w}" for w in range(weights))}, ptr %sums, i64 %row_bytes
) noinline {{
entry:
{starts}
{loop("byte", "0", "%row_bytes", STEP_BYTES, body, "entry")}
{stores}
  ret void
}}
"""


def products(name: str, kind: TileKind, *, rounds: bool) -> str:
    """IR of @NAME_tiles(ARGUMENTS, bytes of a row): all rows of the outputs [begin, end), for packed x and whole steps.

    Needs the thread's tiles configured. Tiles at the edge are moved back: they compute some twice.
    """
    cases = joined([_case(kind, *shape, rounds=rounds) for shape in _SHAPES])
    out_bytes = 2 if rounds else 4
    tokens = f"""  %token_left = sub i64 %T, %token
  %is_wide = icmp sgt i64 %token_left, {SIDE}
  %before = mul i64 %token, %row_bytes
  %x_now = getelementptr i8, ptr %x, i64 %before
  %token1 = add i64 %token, {SIDE}
  br i1 %is_tall, label %tall, label %low
tall:
  br i1 %is_wide, label %case2x2, label %case2x1
low:
  br i1 %is_wide, label %case1x2, label %case1x1
{cases}
stored:"""
    body = f"""  %left = sub i64 %end, %first
  %is_tall = icmp sgt i64 %left, {SIDE}
  %first_far = add i64 %first, {SIDE}
  %output0 = call i64 @llvm.smin.i64(i64 %first, i64 %output_last)
  %output1 = call i64 @llvm.smin.i64(i64 %first_far, i64 %output_last)
  %weight0_byte = mul i64 %output0, %row_bytes
  %weight1_byte = mul i64 %output1, %row_bytes
  %weight0 = getelementptr i8, ptr %weight, i64 %weight0_byte
  %weight1 = getelementptr i8, ptr %weight, i64 %weight1_byte
  %output_byte0 = mul i64 %output0, {out_bytes}
  %output_byte1 = mul i64 %output1, {out_bytes}
{loop("token", "0", "%T", 2 * SIDE, tokens, "first_loop")}"""
    return f"""
define internal void @{name}_tiles({ARGUMENTS}, i64 %row_bytes) noinline {{
entry:
  %sums = alloca [{4 * TILE_BYTES} x i8], align 64
  %out_bytes = mul i64 %O, {out_bytes}
  %output_last = sub i64 %O, {SIDE}
{loop("first", "%begin", "%end", UNIT, body, "entry")}
  ret void
}}
"""


def _case(kind: TileKind, weights: int, tokens: int, *, rounds: bool) -> str:
    """One shape of block, and its sums to their places."""
    shape = f"{weights}x{tokens}"
    pointers = ", ".join(f"ptr %weight{w}" for w in range(weights))
    stores = joined([
        f"  %sum{shape}_{i} = getelementptr i8, ptr %sums, i64 {TILE_BYTES * i}\n"
        f"  call void @tile_store{'_rounded' if rounds else ''}(ptr %sum{shape}_{i}, ptr %out, i64 %T, i64 %out_bytes, "
        f"i64 %{'token1' if t else 'token'}, i64 %output_byte{w})"
        for i, (w, t) in enumerate(product(range(weights), range(tokens)))
    ])
    return f"""case{shape}:
  call void @{kind.name}_tiles_{shape}(ptr %x_now, {pointers}, ptr %sums, i64 %row_bytes)
{stores}
  br label %stored"""
