"""Prefill attention on NVIDIA Hopper: parts of at most 128 (token, head) rows over their paged context.

A persistent grid of one program a multiprocessor; units of work are (kv head, part of a tile), dealt round robin. A
part is consecutive query tokens of one sequence times the G heads of one kv head, 64 // G tokens for each of two
computing warpgroups, which keep the tensor cores busy in turns; a third copies pages into rings in shared memory (TMA,
one copy a page and head). Q lies in shared memory for the whole unit, S[64, C] = Q K^T is masked only in blocks that
some row does not see whole, and the weights go from registers into O[64, H] += P V.

Traffic: 2 * H * itemsize bytes a context slot, kv head and part, from memory for the first part and from the L2 cache
for those beside it; Q is transposed once and O gathered once by XLA, in the size of the step, not of the parts.
Roofline: the tensor cores. 4 * 128 * H flops a context slot against 4 * H bytes: 128 flops a byte from L2.
Not yet run on hardware: see docs/kernels.md.

Blocks start at fixed positions and a part is one sequence's: a chunk gives the same bits whatever runs beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, mosaic
from kernels_pallas.mosaic import MATRIX, NOTHING, PER_ROW, Ref, Ring, along, filled
from kernels_pallas.paged_prefill import mosaic_latent
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.work import SPAN_TOKENS, TILE_TOKENS, AttentionWork

HALF = 64                # (token, head) rows of one computing warpgroup: the rows of a wgmma
ROWS = hopper.QUERY_ROWS     # of a part: two halves
STORED_COLUMNS = 64      # of the output at once: the sum holds half of the registers at heads of 256
LOADER_REGISTERS, MATH_REGISTERS = 24, 240   # of a thread; 24 + 2 * 240 is what three warpgroups have together
LOAD = 2                 # the warpgroup that copies; 0 and 1 compute


def paged_prefill(
    q_TNH: Array,
    k_PKSH: Pages,
    v_PKSH: Pages | None,
    page_RM: Array,
    work: AttentionWork,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sink_N: Array | None,
    value_dim: int | None = None,
    blocks: hopper.Blocks | None = None,
    interpret: Any = None,
) -> Array:
    """See `api.paged_prefill`. `blocks` overrides the sizes, `interpret` runs the simulator."""
    if v_PKSH is None:
        return mosaic_latent.paged_prefill(
            q_TNH, k_PKSH, page_RM, work, scale=scale, value_dim=value_dim, interpret=interpret,
            programs=blocks and blocks.programs,
        )
    T, N, H = q_TNH.shape
    _, K, S, _ = k_PKSH.shape
    options = _Options(
        kv_heads=K, group=N // K, head_dim=H, scale=scale, window=window, soft_cap=soft_cap,
        blocks=blocks or hopper.blocks("paged_prefill", hopper.prefill_need(
            H, S, is_quantized=isinstance(k_PKSH, QuantizedPages)
        )),
    )
    tiles = _tiles(work, options)
    with jax.named_scope("paged_prefill"):
        q_KQH = q_TNH.reshape(T, K, N // K, H).swapaxes(0, 1).reshape(K, T * (N // K), H)
        q_KQH = jnp.pad(q_KQH, ((0, 0), (0, ROWS), (0, 0)))     # the last part may read past the last token
        out_WKQH = _attend(q_KQH, k_PKSH, v_PKSH, page_RM, sink_N, tiles, options, interpret)
        part_T, place_T, is_real_T = _places(tiles, options, T)
        row_TG = (place_T // options.half_tokens * HALF + place_T % options.half_tokens * (N // K))[:, None]
        row_TG += jnp.arange(N // K, dtype=jnp.int32)
        head_K = jnp.arange(K, dtype=jnp.int32)
        out_TKGH = out_WKQH.at[part_T[:, None, None], head_K[:, None], row_TG[:, None]].get(mode="promise_in_bounds")
        return jnp.where(is_real_T[:, None, None], out_TKGH.reshape(T, N, H), 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What a program is compiled for."""

    kv_heads: int
    group: int
    head_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    blocks: hopper.Blocks

    @property
    def tile_tokens(self) -> int:
        """The plan's cut: the smaller tiles fill a part from three heads on."""
        return TILE_TOKENS if self.group >= 3 else SPAN_TOKENS

    @property
    def half_tokens(self) -> int:
        """Of one warpgroup: no token lies in two."""
        return HALF // self.group

    @property
    def part_tokens(self) -> int:
        return 2 * self.half_tokens

    @property
    def parts(self) -> int:
        """Of one tile."""
        return pl.cdiv(self.tile_tokens, self.part_tokens)


class _Tiles(NamedTuple):
    """The prefill section in tiles of `tile_tokens`."""

    count: Array
    token_W: Array
    row_W: Array
    position_W: Array
    size_W: Array


def _tiles(work: AttentionWork, options: _Options) -> _Tiles:
    if options.tile_tokens == TILE_TOKENS:
        return _Tiles(work.tile_count, work.tile_token_W, work.tile_row_W, work.tile_position_W, work.tile_size_W)
    return _Tiles(work.span_count, work.span_token_W, work.span_row_W, work.span_position_W, work.span_size_W)


def _places(tiles: _Tiles, options: _Options, token_count: int) -> tuple[Array, Array, Array]:
    """Of each packed token: its part, its place among the part's tokens, and whether it is in one at all."""
    token_T = jnp.arange(token_count, dtype=jnp.int32)
    is_begun_TW = (tiles.token_W <= token_T[:, None]) & (tiles.size_W > 0)
    tile_T = jnp.maximum(is_begun_TW.sum(-1, dtype=jnp.int32) - 1, 0)    # tiles lie in packed order
    offset_T = token_T - tiles.token_W[tile_T]
    is_real_T = (offset_T >= 0) & (offset_T < tiles.size_W[tile_T])
    offset_T = jnp.where(is_real_T, offset_T, 0)
    return tile_T * options.parts + offset_T // options.part_tokens, offset_T % options.part_tokens, is_real_T


class _Refs(NamedTuple):
    """What a program sees."""

    q_KQH: Ref
    k_PKSH: Ref
    v_PKSH: Ref
    page_RM: Ref
    sink_KQ: Ref
    tile_count: Ref
    token_W: Ref
    row_W: Ref
    position_W: Ref
    size_W: Ref
    out_WKQH: Ref
    q_QH: Ref             # shared memory from here on
    met: Ref              # both computing warpgroups have come
    k_block: Ref
    k_full: Ref
    k_empty: Ref
    v_block: Ref
    v_full: Ref
    v_empty: Ref
    weight: Ref | None = None          # [2, HALF, C]: in the simulator only
    k_scale_PKS: Ref | None = None     # from here on where the pages hold codes
    v_scale_PKS: Ref | None = None
    k_scale: Ref | None = None
    k_wide: Ref | None = None
    v_scale: Ref | None = None
    v_wide: Ref | None = None

    @property
    def keys(self) -> Ring:
        return Ring(self.k_block, self.k_full, self.k_empty, self.k_scale, self.k_wide)

    @property
    def values(self) -> Ring:
        return Ring(self.v_block, self.v_full, self.v_empty, self.v_scale, self.v_wide)


class _Unit(NamedTuple):
    """One part of one tile, for one kv head."""

    part: Array
    head: Array
    token: Array       # its first
    row: Array
    position: Array    # of that token
    begin: Array       # context slots [begin, end) that any of its tokens sees
    end: Array
    first: Array       # first slot of the first block
    block_count: Array     # 0 where the part has no token


def _attend(
    q_KQH: Array, k_PKSH: Pages, v_PKSH: Pages, page_RM: Array, sink_N: Array | None, tiles: _Tiles,
    options: _Options, interpret: Any,
) -> Array:
    """The parts' output [parts, K, ROWS, H]; parts without tokens are left as they are in memory."""
    K, G, H, blocks = options.kv_heads, options.group, options.head_dim, options.blocks
    dtype = q_KQH.dtype
    sink_KQ = jnp.full((K, HALF), NOTHING, jnp.float32)
    if sink_N is not None:
        sink_KG = sink_N.astype(jnp.float32).reshape(K, G) * mosaic.LOG2E
        sink_KQ = sink_KQ.at[:, : options.half_tokens * G].set(jnp.tile(sink_KG, options.half_tokens))
    operands = {
        "q_KQH": q_KQH, **mosaic.pools("k", k_PKSH), **mosaic.pools("v", v_PKSH), "page_RM": page_RM,
        "sink_KQ": sink_KQ, "tile_count": tiles.count.reshape(1), "token_W": tiles.token_W, "row_W": tiles.row_W,
        "position_W": tiles.position_W, "size_W": tiles.size_W,
    }
    scratch = {
        "q_QH": mosaic.shared((ROWS, H), dtype), "met": plgpu.Barrier(num_arrivals=2),
        **mosaic.ring("k", k_PKSH, blocks.stages, blocks.context, dtype, readers=2),
        **mosaic.ring("v", v_PKSH, blocks.stages, blocks.context, dtype, readers=2),
    }
    if interpret:
        scratch["weight"] = mosaic.shared((2, HALF, blocks.context), dtype)

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, "out_WKQH", *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == LOAD)(lambda: _load(seen, options))
        pl.when(warpgroup != LOAD)(lambda: _attend_units(seen, options, warpgroup))

    return mosaic.launch(
        body, *operands.values(), name="paged_prefill_attend", grid={"program": blocks.programs}, threads=3,
        out_type=jax.ShapeDtypeStruct((tiles.row_W.shape[0] * options.parts, K, ROWS, H), dtype),
        scratch=tuple(scratch.values()), interpret=interpret,
    )


def _unit_count(refs: _Refs, options: _Options) -> Array:
    """Units of this program."""
    total = refs.tile_count[0] * options.parts * options.kv_heads
    return pl.cdiv(jnp.maximum(total - lax.axis_index("program"), 0), options.blocks.programs)


def _unit(refs: _Refs, options: _Options, index: Array) -> _Unit:
    """Unit `index` of this program. Neighbours are parts of one kv head: they read the same pages at the same time."""
    linear = lax.axis_index("program") + index * options.blocks.programs
    parts = refs.tile_count[0] * options.parts
    head, part = lax.div(linear, parts), lax.rem(linear, parts)
    tile, offset = lax.div(part, options.parts), lax.rem(part, options.parts) * options.part_tokens
    size = jnp.minimum(refs.size_W[tile] - offset, options.part_tokens)
    position = refs.position_W[tile] + offset
    begin = jnp.int32(0) if options.window is None else jnp.maximum(position - options.window + 1, 0)
    first = begin - lax.rem(begin, options.blocks.context)
    end = position + size
    blocks = jnp.where(size > 0, pl.cdiv(end - first, options.blocks.context), 0)
    return _Unit(part, head, refs.token_W[tile] + offset, refs.row_W[tile], position, begin, end, first, blocks)


def _load(refs: _Refs, options: _Options) -> None:
    """The loader: keys and values of each unit, as far ahead as the rings allow."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def load_unit(index: Array, turn: Array) -> Array:
        unit = _unit(refs, options, index)

        def load_block(block: Array, turn: Array) -> Array:
            first = unit.first + block * options.blocks.context
            for ring, pages_PKSH, scale_PKS in (
                (refs.keys, refs.k_PKSH, refs.k_scale_PKS), (refs.values, refs.v_PKSH, refs.v_scale_PKS)
            ):
                mosaic.load_block(
                    ring, pages_PKSH, scale_PKS, refs.page_RM, unit.row, unit.head, turn,
                    first=first, begin=unit.begin, end=unit.end,
                )
            return turn + 1

        return lax.fori_loop(0, unit.block_count, load_block, turn)

    turns = lax.fori_loop(0, _unit_count(refs, options), load_unit, jnp.int32(0))
    mosaic.drain((refs.keys, refs.values), turns)


def _attend_units(refs: _Refs, options: _Options, warpgroup: Array) -> None:
    """A computing warpgroup: online softmax of its half of the rows, whose output replaces its queries."""
    plgpu.set_max_registers(MATH_REGISTERS, action="increase")
    rows = pl.ds(warpgroup * HALF, HALF)
    H = options.head_dim

    def attend_unit(index: Array, turn: Array) -> Array:
        unit = _unit(refs, options, index)

        @pl.when(unit.block_count > 0)
        def _() -> None:
            # Row by row from memory: a copy by TMA could begin at every eighth row only.
            own = pl.ds((unit.token + warpgroup * options.half_tokens) * options.group, HALF)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)     # the output of the unit before has left
            refs.q_QH[rows] = plgpu.load(refs.q_KQH.at[unit.head, own], layout=MATRIX, optimized=False)
            plgpu.commit_smem()

        def attend_block(block: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            first = unit.first + block * options.blocks.context
            return _attend_block(refs, options, unit, warpgroup, first, *carry)

        top_Q = plgpu.load(refs.sink_KQ.at[unit.head], layout=PER_ROW, optimized=False)
        total_Q = jnp.where(top_Q > NOTHING, 1.0, 0.0)
        start = (top_Q, total_Q, filled((HALF, H), 0.0, MATRIX), turn)
        _, total_Q, sum_QH, turn = lax.fori_loop(0, unit.block_count, attend_block, start)

        @pl.when(unit.block_count > 0)
        def _() -> None:
            weight = along(1.0 / total_Q, 0, (HALF, STORED_COLUMNS))
            for column in range(0, H, STORED_COLUMNS):
                part = lax.slice(sum_QH, (0, column), (HALF, column + STORED_COLUMNS)) * weight
                refs.q_QH[rows, pl.ds(column, STORED_COLUMNS)] = part.astype(refs.q_QH.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.q_QH.at[rows], refs.out_WKQH.at[unit.part, unit.head, rows])

        return turn

    lax.fori_loop(0, _unit_count(refs, options), attend_unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend_block(
    refs: _Refs, options: _Options, unit: _Unit, warpgroup: Array, first: Array,
    top_Q: Array, total_Q: Array, sum_QH: Array, turn: Array,
) -> tuple[Array, ...]:
    """Takes one block of context in."""
    C, H = options.blocks.context, options.head_dim
    place = lax.rem(turn, options.blocks.stages)
    plgpu.barrier_wait(refs.k_full.at[place])
    dot_QC = _products(refs, warpgroup, place, (HALF, C))
    score_QC = mosaic.base_two_scores(dot_QC, scale=options.scale, soft_cap=options.soft_cap)
    score_QC = _mask(score_QC, options, unit, warpgroup, first)
    new_top_Q = jnp.maximum(top_Q, score_QC.max(axis=1))
    keep_Q = jnp.exp2(top_Q - new_top_Q)
    weight_QC = jnp.exp2(score_QC - along(new_top_Q, 0, (HALF, C)))
    total_Q = total_Q * keep_Q + weight_QC.sum(axis=1)
    sum_QH = sum_QH * along(keep_Q, 0, (HALF, H))
    weight_QC = weight_QC.astype(refs.q_QH.dtype)
    # Everything but the product is done before the values are waited for.
    sum_QH, weight_QC, total_Q, new_top_Q = lax.optimization_barrier((sum_QH, weight_QC, total_Q, new_top_Q))
    plgpu.barrier_wait(refs.v_full.at[place])
    if refs.v_wide is not None:
        return new_top_Q, total_Q, _add_codes(refs, unit, warpgroup, first, place, sum_QH, weight_QC), turn + 1

    @pl.when((first < unit.begin) | (first + C > unit.end))
    def _() -> None:      # both warpgroups read all of the values; one clears what neither may see
        pl.when(warpgroup == 0)(
            lambda: mosaic.clear_outside(refs.v_block.at[place], first, unit.begin, unit.end)
        )
        _meet(refs)

    sum_QH = _add_values(refs, sum_QH, weight_QC, refs.v_block.at[place], warpgroup)
    plgpu.barrier_arrive(refs.v_empty.at[place])
    return new_top_Q, total_Q, sum_QH, turn + 1


def _meet(refs: _Refs) -> None:
    """Both computing warpgroups wait for each other."""
    plgpu.barrier_arrive(refs.met)
    plgpu.barrier_wait(refs.met)


def _widen(ring: Ring, place: Array, warpgroup: Array) -> tuple[Ref, Array | int]:
    """Turns a warpgroup's half of a block into numbers: half of the slots, else of the columns. Its first slot too."""
    slots, head_dim = ring.wide.shape
    if slots >= ROWS:
        offset, rows, columns = warpgroup * (slots // 2), slots // 2, pl.ds(0, head_dim)
        own = pl.ds(offset, rows), columns
    else:
        offset, rows = 0, slots
        own = pl.ds(0, rows), pl.ds(warpgroup * (head_dim // 2), head_dim // 2)
    mosaic.widen(ring.block.at[place, *own], ring.wide.at[own], ring.scale.at[place, pl.ds(offset, rows)])
    return ring.wide.at[own], offset


def _products(refs: _Refs, warpgroup: Array, place: Array, shape: tuple[int, int]) -> Array:
    """Queries times keys of a block that has landed, whose place is then free.

    Codes become numbers, half by either warpgroup and scaled at once: a scale a column would cost more registers than
    there are. Neither can write to them again while the other reads: in between the two meet over the values, and over
    the keys for those.
    """
    q_QH = refs.q_QH.at[pl.ds(warpgroup * HALF, HALF)]
    if refs.k_wide is None:
        dot_QC = mosaic.product(shape, q_QH, refs.k_block.at[place].T)
        plgpu.barrier_arrive(refs.k_empty.at[place])
        return dot_QC
    _widen(refs.keys, place, warpgroup)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.k_empty.at[place])
    _meet(refs)
    return mosaic.product(shape, q_QH, refs.k_wide.T)


def _add_codes(
    refs: _Refs, unit: _Unit, warpgroup: Array, first: Array, place: Array, sum_QH: Array, weight_QC: Array
) -> Array:
    """sum + weight @ values, of values that are codes."""
    C = weight_QC.shape[1]
    own, offset = _widen(refs.values, place, warpgroup)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.v_empty.at[place])
    is_edge = (first < unit.begin) | (first + C > unit.end)
    pl.when(is_edge)(lambda: mosaic.clear_outside(own, first + offset, unit.begin, unit.end))
    _meet(refs)
    return _add_values(refs, sum_QH, weight_QC, refs.v_wide, warpgroup)


def _mask(score_QC: Array, options: _Options, unit: _Unit, warpgroup: Array, first: Array) -> Array:
    """Scores with NOTHING where a row does not see a slot; free where every row sees the whole block."""
    C = score_QC.shape[1]
    needed = first + C > unit.position + 1
    if options.window is not None:
        needed |= first <= unit.end - 1 - options.window

    def masked() -> Array:      # a bound a row, not a position an element: registers are short at heads of 256
        row_Q = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=PER_ROW)
        token_Q = lax.div(row_Q, jnp.full_like(row_Q, options.group)) + warpgroup * options.half_tokens
        newest_Q = unit.position - first + token_Q
        slot_QC = plgpu.broadcasted_iota(jnp.int32, (HALF, C), 1, layout=MATRIX)
        seen = jnp.where(slot_QC <= along(newest_Q, 0, (HALF, C)), score_QC, NOTHING)
        if options.window is None:
            return seen
        return jnp.where(slot_QC > along(newest_Q - options.window, 0, (HALF, C)), seen, NOTHING)

    return lax.cond(needed, masked, lambda: score_QC)


def _add_values(refs: _Refs, sum_QH: Array, weight_QC: Array, block: Ref, warpgroup: Array) -> Array:
    """sum + weight @ values, in the accumulator's registers.

    The simulator of jax 0.11 takes neither a left side in registers nor an accumulator that begins with a value; there
    the weights go through shared memory and the sum is added after.
    """
    if refs.weight is not None:
        refs.weight[warpgroup] = weight_QC
        plgpu.commit_smem()
        return sum_QH + mosaic.product(sum_QH.shape, refs.weight.at[warpgroup], block)
    return pl.run_state(lambda total: plgpu.wgmma(total, weight_QC, block))(plgpu.ACC.init(sum_QH))
