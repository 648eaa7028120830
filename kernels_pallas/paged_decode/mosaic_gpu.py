"""Decode attention on NVIDIA Hopper: split over the context, then combined.

Two kernels. `attend`: a persistent grid of one program a multiprocessor; units of work are (piece of a context, kv
head), dealt round robin. In a program one warpgroup copies pages into a ring in shared memory (TMA, one copy a page
and head), the other computes. Scores are taken transposed, S^T[C, G] = K Q^T, so the context is the 64-row side of
wgmma and G heads cost 8 columns, not 64 rows; then O^T[H, G] += V^T P^T. A piece leaves its normalised O^T and its
log-sum-exp. `combine`: one program a (decode slot, kv head) weighs the pieces and takes in the sinks.

Traffic of `attend`: 2 * H * itemsize bytes a context slot and kv head, each read once; `combine` reads and `attend`
writes 4 * H * G bytes a piece and kv head, at most 1/8 of the keys and values of the shortest piece at G = 8.
Roofline: memory. On an H200 that is 36 GB/s a multiprocessor and microsecond, which needs some 50 KiB in flight;
the ring holds 192 KiB. Not yet run on hardware: see docs/kernels.md.

What a sequence gives depends on how its context is cut, which depends on the batch: no bitwise batch invariance.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, mosaic
from kernels_pallas.mosaic import MATRIX, NOTHING, PER_COLUMN, PER_ROW, Ref, Ring, along, filled
from kernels_pallas.paged_decode import mosaic_latent
from kernels_pallas.paged_decode.slots import gather, repeated_sinks, scatter
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.work import AttentionWork

ATTEND, LOAD = 0, 1     # the warpgroups of a program
LOADER_REGISTERS, MATH_REGISTERS = 80, 232   # of a thread; a loader computes addresses only
PIECES_AT_ONCE = 4      # loads in flight of one combining program


def paged_decode(
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
    tokens: int = 1,
    blocks: hopper.Blocks | None = None,
    interpret: Any = None,
) -> Array:
    """See `api.paged_decode`. `blocks` overrides the sizes, `interpret` runs the simulator."""
    if v_PKSH is None:
        return mosaic_latent.paged_decode(
            q_TNH, k_PKSH, page_RM, work, scale=scale, value_dim=value_dim, tokens=tokens, interpret=interpret,
            programs=blocks and blocks.programs,
        )
    T, N, H = q_TNH.shape
    _, K, S, _ = k_PKSH.shape
    group = N // K * tokens
    padded = -(-group // 8) * 8
    options = _Options(
        kv_heads=K, tokens=tokens, heads=N // K, padded_group=padded, head_dim=H,
        scale=scale, window=window, soft_cap=soft_cap,
        blocks=blocks or hopper.blocks("paged_decode", hopper.decode_need(
            H, S, is_quantized=isinstance(k_PKSH, QuantizedPages), group=padded
        )),
    )
    with jax.named_scope("paged_decode"):
        q_WKGH = jnp.pad(gather(q_TNH, work, K, tokens), ((0, 0), (0, 0), (0, padded - group), (0, 0)))
        sink_KG = jnp.full((K, padded), NOTHING, jnp.float32)
        if sink_N is not None:
            sinks_KG = repeated_sinks(sink_N.astype(jnp.float32) * mosaic.LOG2E, K, tokens)
            sink_KG = sink_KG.at[:, :group].set(sinks_KG)
        partial_WKHG, logsum_WKG = _attend(q_WKGH, k_PKSH, v_PKSH, page_RM, work, options, interpret)
        out_WKHG = _combine(partial_WKHG, logsum_WKG, sink_KG, work, options, q_TNH.dtype, interpret)
        return scatter(out_WKHG[..., :group].swapaxes(2, 3), work, T, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What a program is compiled for."""

    kv_heads: int
    tokens: int           # of an entry
    heads: int            # query heads a kv head
    padded_group: int     # tokens * heads, rounded up to the 8 columns that wgmma wants
    head_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    blocks: hopper.Blocks

    @property
    def reach(self) -> int | None:
        """Slots before an entry's end that any of its tokens sees."""
        return None if self.window is None else self.window + self.tokens - 1


class _Refs(NamedTuple):
    """What a program of `attend` sees."""

    q_WKGH: Ref
    k_PKSH: Ref
    v_PKSH: Ref
    page_RM: Ref
    row_W: Ref
    length_W: Ref
    piece_slot_W: Ref
    piece_begin_W: Ref
    piece_end_W: Ref
    piece_count: Ref
    partial_WKHG: Ref
    logsum_WKG: Ref
    q_GH: Ref             # shared memory from here on
    weight_GC: Ref
    q_full: Ref
    q_empty: Ref
    k_block: Ref
    k_full: Ref
    k_empty: Ref
    v_block: Ref
    v_full: Ref
    v_empty: Ref
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
    """One piece of one context, for one kv head."""

    piece: Array
    head: Array
    slot: Array
    begin: Array       # context slots [begin, end), less those before the window
    end: Array
    first: Array       # first slot of the first block
    block_count: Array     # 0 where the whole piece lies before the window


def _attend(
    q_WKGH: Array, k_PKSH: Pages, v_PKSH: Pages, page_RM: Array, work: AttentionWork, options: _Options, interpret: Any
) -> tuple[Array, Array]:
    """Of each piece, O^T [pieces, K, H, G] normalised and its log-sum-exp [pieces, K, G] to base 2."""
    pieces, dtype = work.piece_slot_W.shape[0], q_WKGH.dtype
    K, G, H, blocks = options.kv_heads, options.padded_group, options.head_dim, options.blocks
    operands = {
        "q_WKGH": q_WKGH, **mosaic.pools("k", k_PKSH), **mosaic.pools("v", v_PKSH), "page_RM": page_RM,
        "row_W": work.decode_row_W, "length_W": work.decode_length_W, "piece_slot_W": work.piece_slot_W,
        "piece_begin_W": work.piece_begin_W, "piece_end_W": work.piece_end_W,
        "piece_count": work.piece_count.reshape(1),
    }
    results = {
        "partial_WKHG": jax.ShapeDtypeStruct((pieces, K, H, G), jnp.float32),
        "logsum_WKG": jax.ShapeDtypeStruct((pieces, K, G), jnp.float32),
    }
    scratch = {
        "q_GH": mosaic.shared((G, H), dtype), "weight_GC": mosaic.shared((G, blocks.context), dtype),
        "q_full": plgpu.Barrier(num_arrivals=1), "q_empty": plgpu.Barrier(num_arrivals=1),
        **mosaic.ring("k", k_PKSH, blocks.stages, blocks.context, dtype, readers=1),
        **mosaic.ring("v", v_PKSH, blocks.stages, blocks.context, dtype, readers=1),
    }

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, *results, *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == LOAD)(lambda: _load(seen, options))
        pl.when(warpgroup == ATTEND)(lambda: _attend_units(seen, options))

    return mosaic.launch(
        body, *operands.values(), name="paged_decode_attend", grid={"program": blocks.programs}, threads=2,
        out_type=tuple(results.values()), scratch=tuple(scratch.values()), interpret=interpret,
    )


def _units(refs: _Refs, options: _Options) -> tuple[Array, Array]:
    """This program's first unit, and how many it has."""
    program = lax.axis_index("program")
    left = refs.piece_count[0] * options.kv_heads - program
    return program, pl.cdiv(jnp.maximum(left, 0), options.blocks.programs)


def _unit(refs: _Refs, options: _Options, index: Array) -> _Unit:
    """Unit `index` of this program. Neighbouring programs take the heads of one piece, which share pages."""
    linear = lax.axis_index("program") + index * options.blocks.programs
    piece, head = lax.div(linear, options.kv_heads), lax.rem(linear, options.kv_heads)
    slot, begin, end = refs.piece_slot_W[piece], refs.piece_begin_W[piece], refs.piece_end_W[piece]
    if options.reach is not None:
        begin = jnp.maximum(begin, refs.length_W[slot] - options.reach)
    first = begin - lax.rem(begin, options.blocks.context)
    is_live = begin < end
    blocks = jnp.where(is_live, pl.cdiv(end - first, options.blocks.context), 0)
    return _Unit(piece, head, slot, begin, end, first, blocks)


def _load(refs: _Refs, options: _Options) -> None:
    """The loader: queries of each unit, and its keys and values as far ahead as the rings allow."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def load_unit(index: Array, turn: Array) -> Array:
        unit = _unit(refs, options, index)
        row = refs.row_W[unit.slot]
        plgpu.barrier_wait(refs.q_empty)
        plgpu.copy_gmem_to_smem(refs.q_WKGH.at[unit.slot, unit.head], refs.q_GH, refs.q_full)

        def load_block(block: Array, turn: Array) -> Array:
            first = unit.first + block * options.blocks.context
            for ring, pages_PKSH, scale_PKS in (
                (refs.keys, refs.k_PKSH, refs.k_scale_PKS), (refs.values, refs.v_PKSH, refs.v_scale_PKS)
            ):
                mosaic.load_block(
                    ring, pages_PKSH, scale_PKS, refs.page_RM, row, unit.head, turn,
                    first=first, begin=unit.begin, end=unit.end,
                )
            return turn + 1

        return lax.fori_loop(0, unit.block_count, load_block, turn)

    _, count = _units(refs, options)
    turns = lax.fori_loop(0, count, load_unit, jnp.int32(0))
    plgpu.barrier_wait(refs.q_empty)
    mosaic.drain((refs.keys, refs.values), turns)


def _attend_units(refs: _Refs, options: _Options) -> None:
    """The other warpgroup: online softmax over each unit's blocks; results go from registers to memory."""
    plgpu.set_max_registers(MATH_REGISTERS, action="increase")
    plgpu.barrier_arrive(refs.q_empty)
    C, G, H = options.blocks.context, options.padded_group, options.head_dim

    def attend_unit(index: Array, turn: Array) -> Array:
        unit = _unit(refs, options, index)
        plgpu.barrier_wait(refs.q_full)

        def attend_block(block: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            return _attend_block(refs, options, unit, unit.first + block * C, *carry)

        nothing = (
            filled((G,), NOTHING, PER_COLUMN), filled((C, G), 0.0, MATRIX), filled((H, G), 0.0, MATRIX), turn
        )
        top_G, total_CG, sum_HG, turn = lax.fori_loop(0, unit.block_count, attend_block, nothing)
        plgpu.barrier_arrive(refs.q_empty)

        @pl.when(unit.block_count > 0)
        def _() -> None:
            total_G = total_CG.sum(axis=0)
            refs.partial_WKHG[unit.piece, unit.head] = sum_HG * along(1.0 / total_G, 1, (H, G))
            refs.logsum_WKG[unit.piece, unit.head] = top_G + jnp.log2(total_G)

        return turn

    _, count = _units(refs, options)
    lax.fori_loop(0, count, attend_unit, jnp.int32(0))


def _attend_block(
    refs: _Refs, options: _Options, unit: _Unit, first: Array, top_G: Array, total_CG: Array, sum_HG: Array, turn: Array
) -> tuple[Array, ...]:
    """Takes one block of context in. The denominator is summed over the block only at the end of the unit."""
    C, G, H, stages = options.blocks.context, options.padded_group, options.head_dim, options.blocks.stages
    place = lax.rem(turn, stages)
    is_edge = (first < unit.begin) | (first + C > unit.end)
    plgpu.barrier_wait(refs.k_full.at[place])
    dot_CG = _products(refs, place, (C, G))
    score_CG = mosaic.base_two_scores(dot_CG, scale=options.scale, soft_cap=options.soft_cap)

    def masked() -> Array:
        slot_CG = first + plgpu.broadcasted_iota(jnp.int32, (C, G), 0, layout=MATRIX)
        return jnp.where((slot_CG >= unit.begin) & (slot_CG < unit.end), score_CG, NOTHING)

    score_CG = lax.cond(is_edge, masked, lambda: score_CG)
    if options.tokens > 1:
        score_CG = _mask_drafts(score_CG, options, refs.length_W[unit.slot] - first)
    new_top_G = jnp.maximum(top_G, score_CG.max(axis=0))
    keep_G = jnp.exp2(top_G - new_top_G)
    weight_CG = jnp.exp2(score_CG - along(new_top_G, 1, (C, G)))
    total_CG = total_CG * along(keep_G, 1, (C, G)) + weight_CG
    values = refs.v_block.at[place]
    if refs.v_wide is not None:
        values = refs.v_wide
        plgpu.barrier_wait(refs.v_full.at[place])
        weight_CG *= along(mosaic.held_scales(refs.values, place, PER_ROW, first, unit.begin, unit.end), 0, (C, G))
        mosaic.widen(refs.v_block.at[place], values)
    weight_cast_CG = plgpu.layout_cast(weight_CG.astype(refs.weight_GC.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    refs.weight_GC.T[...] = weight_cast_CG
    plgpu.commit_smem()
    if refs.v_wide is None:
        plgpu.barrier_wait(refs.v_full.at[place])
    pl.when(is_edge)(lambda: mosaic.clear_outside(values, first, unit.begin, unit.end))
    added_HG = mosaic.product((H, G), values.T, refs.weight_GC.T)
    plgpu.barrier_arrive(refs.v_empty.at[place])
    return new_top_G, total_CG, sum_HG * along(keep_G, 1, (H, G)) + added_HG, turn + 1


def _mask_drafts(score_CG: Array, options: _Options, length: Array) -> Array:
    """Scores with NOTHING where a token that has others after it does not see a slot.

    A column may see nothing of a whole piece: its log-sum-exp is then so small that the combining kernel drops it.

    Args:
      length: of the entry, less the block's first slot.
    """
    C, G = score_CG.shape

    def masked() -> Array:
        column_G = plgpu.broadcasted_iota(jnp.int32, (G,), 0, layout=PER_COLUMN)
        token_G = jnp.minimum(lax.div(column_G, jnp.full_like(column_G, options.heads)), options.tokens - 1)
        end_G = length - (options.tokens - 1) + token_G
        slot_CG = plgpu.broadcasted_iota(jnp.int32, (C, G), 0, layout=MATRIX)
        seen_CG = jnp.where(slot_CG < along(end_G, 1, (C, G)), score_CG, NOTHING)
        if options.window is None:
            return seen_CG
        return jnp.where(slot_CG >= along(end_G - options.window, 1, (C, G)), seen_CG, NOTHING)

    needed = length - (options.tokens - 1) < C
    if options.window is not None:
        needed |= length > options.window
    return lax.cond(needed, masked, lambda: score_CG)


def _products(refs: _Refs, place: Array, shape: tuple[int, int]) -> Array:
    """Keys times queries of a block that has landed, whose place is then free."""
    if refs.k_wide is None:
        dot_CG = mosaic.product(shape, refs.k_block.at[place], refs.q_GH.T)
        plgpu.barrier_arrive(refs.k_empty.at[place])
        return dot_CG
    mosaic.widen(refs.k_block.at[place], refs.k_wide)
    scale_C = mosaic.scales(refs.keys, place, PER_ROW)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.k_empty.at[place])
    return mosaic.product(shape, refs.k_wide, refs.q_GH.T) * along(scale_C, 0, shape)


def _combine(
    partial_WKHG: Array, logsum_WKG: Array, sink_KG: Array, work: AttentionWork, options: _Options, dtype: Any,
    interpret: Any,
) -> Array:
    """Attention output [slots, K, H, G]; zero for slots past decode_count."""
    slots = work.decode_token_W.shape[0]
    _, K, H, G = partial_WKHG.shape

    def body(partial: Ref, logsum: Ref, sink: Ref, first_W: Ref, end_W: Ref, length_W: Ref, out: Ref) -> None:
        slot, head = lax.axis_index("slot"), lax.axis_index("head")
        begin, end = first_W[slot], first_W[slot + 1]
        unseen = 0 if options.reach is None else length_W[slot] - options.reach

        def weigh(part_HG: Array, log_G: Array, top_G: Array, total_G: Array, sum_HG: Array) -> tuple[Array, ...]:
            new_top_G = jnp.maximum(top_G, log_G)
            keep_G, weight_G = jnp.exp2(top_G - new_top_G), jnp.exp2(log_G - new_top_G)
            sum_HG = sum_HG * along(keep_G, 1, (H, G)) + part_HG * along(weight_G, 1, (H, G))
            return new_top_G, total_G * keep_G + weight_G, sum_HG

        def add(turn: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            wanted = [begin + turn * PIECES_AT_ONCE + i for i in range(PIECES_AT_ONCE)]
            piece = [jnp.minimum(index, end - 1) for index in wanted]
            part_HG = [plgpu.load(partial.at[i, head], layout=MATRIX, optimized=False) for i in piece]
            log_G = [plgpu.load(logsum.at[i, head], layout=PER_COLUMN, optimized=False) for i in piece]
            for i in range(PIECES_AT_ONCE):
                # Neither a piece counted twice nor one before the window, which nobody wrote.
                is_live = (wanted[i] < end) & (end_W[piece[i]] > unseen)
                weighed = functools.partial(weigh, part_HG[i], log_G[i], *carry)
                carry = lax.cond(is_live, weighed, lambda carry=carry: carry)
            return carry

        sink_G = plgpu.load(sink.at[head], layout=PER_COLUMN, optimized=False)
        start = (sink_G, jnp.where(sink_G > NOTHING, 1.0, 0.0), filled((H, G), 0.0, MATRIX))
        _, total_G, sum_HG = lax.fori_loop(0, pl.cdiv(end - begin, PIECES_AT_ONCE), add, start)
        total_G = jnp.where(total_G > 0, total_G, 1.0)
        out[slot, head] = (sum_HG * along(1.0 / total_G, 1, (H, G))).astype(dtype)

    return mosaic.launch(
        body, partial_WKHG, logsum_WKG, sink_KG, work.decode_piece_W, work.piece_end_W, work.decode_length_W,
        name="paged_decode_combine", grid={"slot": slots, "head": K}, threads=1, interpret=interpret,
        out_type=jax.ShapeDtypeStruct((slots, K, H, G), dtype), scratch=(),
    )
