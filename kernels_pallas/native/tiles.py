"""x · weightᵀ by the tile registers of AMX: 16 outputs x 16 tokens a register, over steps of 64 bytes of a row.

A tile of weights is 64 bytes of 16 rows as checkpoints store them; a tile of x holds 4 bytes (two bfloat16, four int8)
of 16 tokens side by side, so x is put into that order first, a span of tokens at a time. A block is up to 2 tiles of
outputs x 2 of tokens: four loads feed four multiplications of 16 x 16 x 32 numbers. Sums are turned when they are
stored.
Traffic: the weights from memory once a span; x from the L2 cache for every 32 outputs, whose weights stay in the L1
cache, slab by slab of their rows.
Work: 512 multiplications of bfloat16 a cycle and core, 16 times what a 512-bit register gives. Loads are the limit: a
step of a block takes 25 ns from the L1 cache and 44 from the L2 where its multiplications take 21.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (tile configuration), and
volume 2 (LDTILECFG, TILELOADD, TDPBF16PS, TDPBSSD).
Invariant: a sum is made by the same additions in the same order whatever the other rows are, and however many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from kernels_pallas.native.runtime import joined, loop
from kernels_pallas.native.vectors import LANES, transposed

SIDE = 16               # rows of a tile, and its columns of 4 bytes
STEP_BYTES = 64         # of a row, in a tile
TILE_BYTES = SIDE * STEP_BYTES
UNIT = 2 * SIDE         # outputs of a block
SLAB_TOKENS_MIN = 64
SLAB_BYTES = 1152       # of their rows: 36 KB stay in an L1 cache of 48 while all tokens pass by
ARGUMENTS = "ptr %x, ptr %weight, ptr %out, i64 %T, i64 %O, i64 %I, i64 %begin, i64 %end"
_WEIGHTS, _TOKENS = (4, 5), (6, 7)      # tile registers; sums are in the first four
_SHAPES = tuple(product((1, 2), (1, 2)))

_PALETTE = [1, 0, *[0] * 14, *[STEP_BYTES, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8]
DECLARATIONS = f"""
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tileloaddt164(i8, ptr, i64)
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


def pass_by(register: int, at: str, stride: str) -> str:
    """As `load`, of what had better not push other numbers out of the L1 cache."""
    return f"  call void @llvm.x86.tileloaddt164(i8 {register}, ptr {at}, i64 {stride})"


def store(register: int, at: str, stride: str) -> str:
    return f"  call void @llvm.x86.tilestored64(i8 {register}, ptr {at}, i64 {stride})"


def zero(register: int) -> str:
    return f"  call void @llvm.x86.tilezero(i8 {register})"


def multiply(kind: TileKind, sums: int, first: int, second: int) -> str:
    return f"  call void @llvm.x86.{kind.multiply}(i8 {sums}, i8 {first}, i8 {second})"


def _rounded(i: str, register: str) -> str:
    """IR that stores float32 `register` (of type <16 x i32>) at %toI as bfloat16."""
    return (
        f"  %long{i} = bitcast <16 x i32> {register} to <16 x float>\n"
        f"  %short{i} = fptrunc <16 x float> %long{i} to <16 x bfloat>\n"
        f"  store <16 x bfloat> %short{i}, ptr %to{i}, align 2"
    )


def _pack() -> str:
    """@tile_pack(x, packed, T, bytes of a row): x in tiles, those of 16 tokens one after the other.

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
define internal void @tile_pack(ptr %x, ptr %packed, i64 %T, i64 %row_bytes) noinline {{
entry:
  %last = sub i64 %T, 1
{loop("token", "0", "%T", SIDE, body, "entry")}
  ret void
}}
"""


def _store(*, rounds: bool) -> str:
    """@tile_store(sums, out, T, bytes of a result's row, first token, byte in it): 16 outputs of up to 16 tokens.

    @tile_store_rounded rounds float32 to bfloat16. Tokens past the last hold what the last holds.
    """
    loads = joined([
        f"  %at{r} = getelementptr i8, ptr %sums, i64 {STEP_BYTES * r}\n"
        f"  %of{r} = load <16 x i32>, ptr %at{r}, align 64" for r in range(SIDE)
    ])
    lines, turned = transposed([f"%of{r}" for r in range(SIDE)])
    stores = joined([       # from the last on: where tokens past it are stored, it is stored after them
        f"  %token{t}_far = add i64 %token, {t}\n"
        f"  %token{t} = call i64 @llvm.smin.i64(i64 %token{t}_far, i64 %last)\n"
        f"  %row{t} = mul i64 %token{t}, %out_bytes\n"
        f"  %byte{t} = add i64 %row{t}, %byte\n"
        f"  %to{t} = getelementptr i8, ptr %out, i64 %byte{t}\n"
        + (_rounded(str(t), turned[t]) if rounds else f"  store <16 x i32> {turned[t]}, ptr %to{t}, align 4")
        for t in reversed(range(LANES))
    ])
    return f"""
define internal void @tile_store{"_rounded" if rounds else ""}(
  ptr %sums, ptr %out, i64 %T, i64 %out_bytes, i64 %token, i64 %byte
) noinline {{
  %last = sub i64 %T, 1
{loads}
{joined(lines)}
{stores}
  ret void
}}
"""


def _block(kind: TileKind, weights: int, tokens: int) -> str:
    """@KIND_tiles_WxT(x, W weights, sums, bytes of a row, from, to), for 1 and 2 tiles of weights and of tokens.

    x points to the first of its tokens' tiles, a weight to the first of its 16 rows. What bytes [from, to) of the rows
    give is added to `sums`, whole tiles in order of weights, then tokens; with from = 0 they are written.
    """
    pairs = list(product(range(weights), range(tokens)))
    loads = [
        f"  %now{w} = getelementptr i8, ptr %weight{w}, i64 %byte\n" + load(_WEIGHTS[w], f"%now{w}", "%row_bytes")
        for w in range(weights)
    ] + [
        f"  %tile{t} = getelementptr i8, ptr %tokens{t}, i64 %in_row\n"
        + pass_by(_TOKENS[t], f"%tile{t}", str(STEP_BYTES)) for t in range(tokens)
    ]
    body = joined([f"  %in_row = mul i64 %byte, {SIDE}", *loads] + [
        multiply(kind, w * tokens + t, _WEIGHTS[w], _TOKENS[t]) for w, t in pairs
    ])
    places = joined([
        f"  %before{t} = mul i64 %row_bytes, {SIDE * t}\n  %tokens{t} = getelementptr i8, ptr %x, i64 %before{t}"
        for t in range(tokens)
    ] + [f"  %sum{i} = getelementptr i8, ptr %sums, i64 {TILE_BYTES * i}" for i in range(len(pairs))])
    each = range(len(pairs))
    return f"""
define internal void @{kind.name}_tiles_{weights}x{tokens}(
  ptr %x, {", ".join(f"ptr %weight{w}" for w in range(weights))}, ptr %sums, i64 %row_bytes, i64 %from, i64 %to
) noinline {{
entry:
{places}
  %is_first = icmp eq i64 %from, 0
  br i1 %is_first, label %first, label %later
first:
{joined([zero(i) for i in each])}
  br label %add
later:
{joined([load(i, f"%sum{i}", str(STEP_BYTES)) for i in each])}
  br label %add
add:
{loop("byte", "%from", "%to", STEP_BYTES, body, "add")}
{joined([store(i, f"%sum{i}", str(STEP_BYTES)) for i in each])}
  ret void
}}
"""


SLABS = f"""
  ; Rows are taken in equal slabs of {SLAB_BYTES} bytes at most, and of whole steps; whole where few tokens pass by.
  %slabs_above = add i64 %row_bytes, {SLAB_BYTES - 1}
  %slabs_many = udiv i64 %slabs_above, {SLAB_BYTES}
  %are_few = icmp sle i64 %T, {SLAB_TOKENS_MIN}
  %slabs = select i1 %are_few, i64 1, i64 %slabs_many
  %slab_above = add i64 %row_bytes, %slabs
  %slab_most = sub i64 %slab_above, 1
  %slab_least = udiv i64 %slab_most, %slabs
  %slab_over = add i64 %slab_least, {STEP_BYTES - 1}
  %slab_bytes = and i64 %slab_over, {-STEP_BYTES}
  %is_one_slab = icmp eq i64 %slabs, 1
  %sums_step = select i1 %is_one_slab, i64 0, i64 {4 * TILE_BYTES}
  %sums_blocks_above = add i64 %T, {2 * SIDE - 1}
  %sums_blocks = udiv i64 %sums_blocks_above, {2 * SIDE}
  %sums_blocks_used = select i1 %is_one_slab, i64 1, i64 %sums_blocks
  %sums_bytes = mul i64 %sums_blocks_used, {4 * TILE_BYTES}
  %sums_all = call ptr @aligned_alloc(i64 64, i64 %sums_bytes)"""


def over_tokens(kind: TileKind, weights: int, stores: Callable[[int], str], before: str) -> str:
    """IR of a loop over slabs and tokens, after SLABS: all rows times the `weights` tiles from %weight0 (and 1) on.

    Args:
      stores: IR that puts the sums at %sums of so many tiles of tokens, from %token on, to their places.
      before: the block it is entered from; goes on in block slabW_end.
    """
    pointers = ", ".join(f"ptr %weight{w}" for w in range(weights))
    cases = joined([
        f"""tokens{weights}x{tokens}:
  call void @{kind.name}_tiles_{weights}x{tokens}(ptr %x{weights}_now, {pointers}, ptr %sums{weights}, i64 %row_bytes,
    i64 %slab{weights}, i64 %slab{weights}_stop)
  br i1 %is_last{weights}, label %store{weights}x{tokens}, label %done{weights}
store{weights}x{tokens}:
{stores(tokens)}
  br label %done{weights}""" for tokens in (1, 2)
    ])
    inner = f"""  %left{weights} = sub i64 %T, %token{weights}
  %is_wide{weights} = icmp sgt i64 %left{weights}, {SIDE}
  %before{weights} = mul i64 %token{weights}, %row_bytes
  %x{weights}_now = getelementptr i8, ptr %x, i64 %before{weights}
  %sums{weights}_number = udiv i64 %token{weights}, {2 * SIDE}
  %sums{weights}_byte = mul i64 %sums{weights}_number, %sums_step
  %sums{weights} = getelementptr i8, ptr %sums_all, i64 %sums{weights}_byte
  br i1 %is_wide{weights}, label %tokens{weights}x2, label %tokens{weights}x1
{cases}
done{weights}:"""
    outer = f"""  %slab{weights}_far = add i64 %slab{weights}, %slab_bytes
  %slab{weights}_stop = call i64 @llvm.smin.i64(i64 %slab{weights}_far, i64 %row_bytes)
  %is_last{weights} = icmp eq i64 %slab{weights}_stop, %row_bytes
{loop(f"token{weights}", "0", "%T", 2 * SIDE, inner, f"slab{weights}_loop")}"""
    return loop(f"slab{weights}", "0", "%row_bytes", "%slab_bytes", outer, before)


def products(name: str, kind: TileKind, *, rounds: bool) -> str:
    """IR of @NAME_tiles(ARGUMENTS, bytes of a row): all rows of the outputs [begin, end), for packed x and whole steps.

    Needs the thread's tiles configured. Tiles at the edge are moved back: they compute some twice.
    """
    out_bytes, stored = (2, "tile_store_rounded") if rounds else (4, "tile_store")

    def stores(weights: int, tokens: int) -> str:
        lines = [f"  %far{weights}x{tokens} = add i64 %token{weights}, {SIDE}"]
        for i, (w, t) in enumerate(product(range(weights), range(tokens))):
            token = f"%far{weights}x{tokens}" if t else f"%token{weights}"
            lines.append(
                f"  %sum{weights}x{tokens}_{i} = getelementptr i8, ptr %sums{weights}, i64 {TILE_BYTES * i}\n"
                f"  call void @{stored}(ptr %sum{weights}x{tokens}_{i}, ptr %out, i64 %T, i64 %out_bytes, "
                f"i64 {token}, i64 %output_byte{w})"
            )
        return joined(lines)

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
  br i1 %is_tall, label %tall, label %low
low:
{over_tokens(kind, 1, lambda tokens: stores(1, tokens), "low")}
  br label %stored
tall:
{over_tokens(kind, 2, lambda tokens: stores(2, tokens), "tall")}
  br label %stored
stored:"""
    return f"""
define internal void @{name}_tiles({ARGUMENTS}, i64 %row_bytes) noinline {{
entry:
  %out_bytes = mul i64 %O, {out_bytes}
  %output_last = sub i64 %O, {SIDE}
{SLABS}
{loop("first", "%begin", "%end", UNIT, body, "entry")}
  call void @free(ptr %sums_all)
  ret void
}}
"""
