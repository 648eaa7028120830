"""Attention over a latent cache on NVIDIA Hopper: keys that are values too, one kv head for all query heads (MLA).

The cache has H = value_dim + rope numbers a slot (DeepSeek: 512 + 64); scores use all of them, values are the first
value_dim. One kernel serves decode and prefill: they differ in who made the units.
A persistent grid of one program a multiprocessor; a unit is (at most 64 rows of queries, consecutive context slots),
dealt round robin, and rows are (token, head). Three warpgroups a program: one copies pages into a ring of two blocks of
64 slots (TMA, one copy a page); SCORE takes S[64, 64] = Q K^T and the softmax, leaves the weights and what the older
sum is to be multiplied by in shared memory; then SCORE and VALUE each add P V to their share of the value columns, 192
and 320 of 512: 96 and 160 registers a thread.

Traffic: 2 * H bytes a context slot and unit, each block read once for scores and values; queries 2 * H and results
2 * value_dim bytes a row. For 576 + 512 a block is 72 KiB and the ring all that fits beside the queries: 224 KiB.
Codes are H bytes and a scale a slot. Each warpgroup widens the columns that it adds up into one block in 16 bits, SCORE
those of no value too; nobody reads another's columns after the scores, so the next block's widening overlaps. Scales
multiply scores and weights. Two blocks of codes and that one: 225 KiB.
Roofline: memory for decode. At 36 GB/s a multiprocessor and microsecond a block takes 2 us; its products,
2 * 64 * 64 * (576 + 512) operations, take 1.2 us at the peak of the tensor cores, whatever rows are filled.
Prefill reads a block from the L2 cache for each 64 rows: 62 operations a byte, so L2 bounds it before the tensor cores
do. A block of codes takes memory 1 us, and its products and the instructions that widen it some 1.9: no longer memory.
Not yet run on hardware: see docs/kernels.md.
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
from kernels_pallas.hopper import LATENT_COLUMNS as TILE
from kernels_pallas.hopper import LATENT_ROWS as ROWS
from kernels_pallas.hopper import LATENT_SLOTS as SLOTS
from kernels_pallas.mosaic import MATRIX, NOTHING, PER_COLUMN, PER_ROW, Ref, Ring, along, filled
from kernels_pallas.quantized import Pages, QuantizedPages

SCORE, VALUE, LOAD = 0, 1, 2       # the warpgroups of a program
WGMMA_COLUMNS_MAX = 256
LOADER_REGISTERS, MATH_REGISTERS = 24, 240   # of a thread; 24 + 2 * 240 is what three warpgroups have together


class Units(NamedTuple):
    """What the programs do, [W] each; those past `count`, and empty contexts, are passed over."""

    count: Array
    query_W: Array       # first row of its queries in the array of them, a multiple of 8
    out_W: Array         # first row of its results, likewise
    size_W: Array        # tokens that mean anything
    row_W: Array         # of the page table
    begin_W: Array       # context slots [begin, end); begin is a multiple of SLOTS
    end_W: Array
    newest_W: Array      # position of its first token: the last slot that this one sees


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a program is compiled for.

    Attributes:
      heads: query heads, filled up to a multiple of 8, and of 64 above that.
      tokens: of a unit; of more than 64 heads one token is in several units.
    """

    heads: int
    tokens: int
    value_dim: int
    scale: float
    programs: int
    stages: int = hopper.LATENT_STAGES

    @property
    def rows(self) -> int:
        """Of a unit that mean anything."""
        return min(self.heads * self.tokens, ROWS)

    @property
    def parts(self) -> int:
        """Units that share a token."""
        return pl.cdiv(self.heads, ROWS)

    def columns(self, warpgroup: int) -> range:
        """Of the values, that SCORE or VALUE adds up. SCORE has fewer: it holds scores, and takes their products."""
        first = max(TILE, self.value_dim * 3 // 8 // TILE * TILE)
        return range(first) if warpgroup == SCORE else range(first, self.value_dim)


def options_of(heads: int, *, tokens: int, value_dim: int, scale: float, programs: int | None = None) -> Options:
    """For that many query heads, at most `tokens` tokens of which lie side by side; in `programs` programs."""
    heads = -(-heads // 8) * 8 if heads <= ROWS else -(-heads // ROWS) * ROWS
    return Options(
        heads=heads, tokens=max(1, min(tokens, ROWS // heads)), value_dim=value_dim, scale=scale,
        programs=programs or hopper.multiprocessors(),
    )


def query_rows(q_TNH: Array, options: Options) -> Array:
    """Queries [T * heads + ROWS, H]: the last unit may read past the last token."""
    T, N, H = q_TNH.shape
    q_TNH = jnp.pad(q_TNH, ((0, 0), (0, options.heads - N), (0, 0)))
    return jnp.pad(q_TNH.reshape(T * options.heads, H), ((0, ROWS), (0, 0)))


def grouped(out_QH: Array, heads: int, options: Options) -> Array:
    """Results of rows [tokens * heads, value_dim] by token, [tokens, heads, value_dim], less what was filled up."""
    return out_QH.reshape(-1, options.heads, options.value_dim)[:, :heads]


class _Refs(NamedTuple):
    """What a program sees."""

    q_QH: Ref
    k_PKSH: Ref
    page_RM: Ref
    count: Ref
    query_W: Ref
    out_W: Ref
    size_W: Ref
    row_W: Ref
    begin_W: Ref
    end_W: Ref
    newest_W: Ref
    out_QH: Ref
    logsum_WQ: Ref
    score_1QH: Ref         # shared memory from here on: SCORE's columns of the queries, then of the results
    value_1QH: Ref         # those of VALUE
    weight_QC: Ref
    k_block: Ref
    k_full: Ref
    k_empty: Ref
    q_full: Ref
    q_empty: Ref
    weight_full: Ref
    weight_empty: Ref
    factor_Q: Ref          # what VALUE multiplies its sum by
    rest_1QH: Ref | None = None     # [1, ROWS, H - value_dim] of the queries
    k_scale_PKS: Ref | None = None  # from here on where the pages hold codes
    k_scale: Ref | None = None
    k_wide: Ref | None = None
    wide_full: Ref | None = None    # VALUE's columns of it are there

    @property
    def ring(self) -> Ring:
        return Ring(self.k_block, self.k_full, self.k_empty, self.k_scale, self.k_wide)


Sums = tuple[Array, ...]     # of a warpgroup's columns, as many side by side as one wgmma takes


class _Unit(NamedTuple):
    index: Array
    query: Array
    row: Array
    begin: Array
    end: Array
    newest: Array
    block_count: Array


def attend(
    q_QH: Array, k_PKSH: Pages, page_RM: Array, units: Units, options: Options, out_rows: int, interpret: Any
) -> tuple[Array, Array]:
    """Normalised outputs [out_rows, value_dim] in the type of q, and of each unit log-sum-exps [W, ROWS] to base 2.

    What no unit writes is left as it is in memory.
    """
    H, dtype, count = k_PKSH.shape[3], q_QH.dtype, units.query_W.shape[0]
    operands = {
        "q_QH": q_QH, **mosaic.pools("k", k_PKSH), "page_RM": page_RM, "count": units.count.reshape(1),
        **{name: getattr(units, name) for name in Units._fields[1:]},
    }
    results = {
        "out_QH": jax.ShapeDtypeStruct((out_rows, options.value_dim), dtype),
        "logsum_WQ": jax.ShapeDtypeStruct((count, ROWS), jnp.float32),
    }
    scratch = {
        "score_1QH": mosaic.shared((1, ROWS, len(options.columns(SCORE))), dtype, TILE),
        "value_1QH": mosaic.shared((1, ROWS, len(options.columns(VALUE))), dtype, TILE),
        "weight_QC": mosaic.shared((ROWS, SLOTS), dtype),
        **mosaic.ring("k", k_PKSH, options.stages, SLOTS, dtype, readers=2),
        "q_full": plgpu.Barrier(num_arrivals=2 + (options.value_dim < H)), "q_empty": plgpu.Barrier(num_arrivals=2),
        "weight_full": plgpu.Barrier(num_arrivals=1), "weight_empty": plgpu.Barrier(num_arrivals=1),
        "factor_Q": plgpu.SMEM((ROWS,), jnp.float32),
    }
    if options.value_dim < H:
        scratch["rest_1QH"] = mosaic.shared((1, ROWS, H - options.value_dim), dtype)
    if isinstance(k_PKSH, QuantizedPages):
        scratch |= {"k_wide": mosaic.shared((1, SLOTS, H), dtype), "wide_full": plgpu.Barrier(num_arrivals=1)}

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, *results, *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == LOAD)(lambda: _load(seen, options))
        pl.when(warpgroup == SCORE)(lambda: _score_units(seen, options, is_simulated=bool(interpret)))
        pl.when(warpgroup == VALUE)(lambda: _value_units(seen, options, is_simulated=bool(interpret)))

    return mosaic.launch(
        body, *operands.values(), name="latent_attend", grid={"program": options.programs}, threads=3,
        out_type=tuple(results.values()), scratch=tuple(scratch.values()), interpret=interpret,
        reduction_bytes=0,
    )


def _each_unit(refs: _Refs, options: Options, work: Any) -> Array:
    """Calls work(unit, blocks before it) for each unit of this program that has any; all blocks of the program."""

    def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        index, turn = carry
        unit = _unit(refs, index)
        pl.when(unit.block_count > 0)(lambda: work(unit, turn))
        return index + options.programs, turn + unit.block_count

    # The count is read again each time: a register less across a unit.
    start = lax.axis_index("program"), jnp.int32(0)
    return lax.while_loop(lambda carry: carry[0] < refs.count[0], one, start)[1]


def _unit(refs: _Refs, index: Array) -> _Unit:
    begin, end = refs.begin_W[index], refs.end_W[index]
    blocks = pl.cdiv(jnp.maximum(end - begin, 0), SLOTS)
    return _Unit(index, refs.query_W[index], refs.row_W[index], begin, end, refs.newest_W[index], blocks)


def _load(refs: _Refs, options: Options) -> None:
    """The loader: queries of each unit, and its blocks as far ahead as the ring allows."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def load_unit(unit: _Unit, turn: Array) -> None:
        plgpu.barrier_wait(refs.q_empty)
        own, to = pl.ds(pl.multiple_of(unit.query, 8), options.rows), pl.ds(0, options.rows)
        for columns, part in _query_parts(refs):
            plgpu.copy_gmem_to_smem(refs.q_QH.at[own, columns], part.at[to], refs.q_full)

        def load_block(block: Array, carry: None) -> None:
            mosaic.load_block(
                refs.ring, refs.k_PKSH, refs.k_scale_PKS, refs.page_RM, unit.row, jnp.int32(0), turn + block,
                first=unit.begin + block * SLOTS, begin=unit.begin, end=unit.end,
            )

        lax.fori_loop(0, unit.block_count, load_block, None)

    turns = _each_unit(refs, options, load_unit)
    plgpu.barrier_wait(refs.q_empty)
    mosaic.drain((refs.ring,), turns)


def _query_parts(refs: _Refs, zero: Array | int = 0) -> list[tuple[Any, Ref]]:
    """Columns of the queries, and where they lie in shared memory: tiles of one part are contiguous, as copies need."""
    found, first = [], 0
    for part in (refs.score_1QH, refs.value_1QH, refs.rest_1QH):
        if part is not None:
            found.append((pl.ds(first, part.shape[2]), part.at[zero]))
            first += part.shape[2]
    return found


def _numbers(refs: _Refs, options: Options, warpgroup: int, turn: Array) -> Ref:
    """A block [SLOTS, H] that has landed, as numbers that products can read.

    Of codes a warpgroup widens the columns that it adds up, SCORE also those that are no values: nobody else reads them
    from the scores on. The caller commits.
    """
    place = lax.rem(turn, options.stages)
    plgpu.barrier_wait(refs.k_full.at[place])
    if refs.k_wide is None:
        return refs.k_block.at[place]
    wide_CH = refs.k_wide.at[_zero(turn)]
    own = options.columns(warpgroup)
    rest = range(options.value_dim, refs.k_wide.shape[2] if warpgroup == SCORE else options.value_dim)
    for columns in (pl.ds(part.start, len(part)) for part in (own, rest) if part):
        mosaic.widen(refs.k_block.at[place, :, columns], wide_CH.at[:, columns])
    return wide_CH


def _zero(turn: Array) -> Array:
    """0, which no compiler knows: it would keep all addresses in a constant place across the loops, in registers."""
    return jnp.minimum(turn, 0)


def _products(refs: _Refs, block: Ref, turn: Array) -> Array:
    """Queries times keys."""

    def multiply(total: Ref) -> Array:
        for columns, part in _query_parts(refs, _zero(turn)):
            plgpu.wgmma(total, part, block.at[:, columns].T)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, SLOTS), jnp.float32))


def _scores(refs: _Refs, options: Options, unit: _Unit, turn: Array, first: Array) -> tuple[Ref, Array]:
    """A block as numbers, and its scores."""
    block_CH = _numbers(refs, options, SCORE, turn)
    if refs.k_wide is not None:
        plgpu.commit_smem()
        plgpu.barrier_wait(refs.wide_full)
    score_QC = _products(refs, block_CH, turn) * (options.scale * mosaic.LOG2E)
    if refs.k_wide is not None:
        scale_C = mosaic.scales(refs.ring, lax.rem(turn, options.stages), PER_COLUMN)
        score_QC *= along(scale_C, 1, score_QC.shape)
    return block_CH, _mask(score_QC, options, unit, first)


def _shares(refs: _Refs, options: Options, unit: _Unit, turn: Array, first: Array, weight_QC: Array) -> Array:
    """What values are to be multiplied by, in their type: of codes times what they stand for. Their place is then free.

    Scales are read again, not kept: they are 16 registers.
    """
    if refs.k_wide is not None:
        place = lax.rem(turn, options.stages)
        scale_C = mosaic.held_scales(refs.ring, place, PER_COLUMN, first, unit.begin, unit.end)
        weight_QC *= along(scale_C, 1, weight_QC.shape)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.k_empty.at[place])
    return weight_QC.astype(refs.weight_QC.dtype)


def _score_units(refs: _Refs, options: Options, *, is_simulated: bool) -> None:
    """Scores, softmax, and the first of the value columns."""
    plgpu.set_max_registers(MATH_REGISTERS, action="increase")
    plgpu.barrier_arrive(refs.q_empty)
    add_values = functools.partial(_add_values, refs, options, SCORE, is_simulated=is_simulated)

    def score_unit(unit: _Unit, turn: Array) -> None:
        plgpu.barrier_wait(refs.q_full)

        def score_block(block: Array, carry: tuple[Array, Array, Sums]) -> tuple[Array, Array, Sums]:
            top_Q, total_Q, sums = carry
            place, first = lax.rem(turn + block, options.stages), unit.begin + block * SLOTS
            block_CH, score_QC = _scores(refs, options, unit, turn + block, first)
            new_top_Q = jnp.maximum(top_Q, score_QC.max(axis=1))
            keep_Q = jnp.exp2(top_Q - new_top_Q)
            weight_QC = jnp.exp2(score_QC - along(new_top_Q, 0, (ROWS, SLOTS)))
            total_Q = total_Q * keep_Q + weight_QC.sum(axis=1)
            share_QC = _shares(refs, options, unit, turn + block, first, weight_QC)
            plgpu.barrier_wait(refs.weight_empty)
            refs.weight_QC[...] = share_QC
            refs.factor_Q[...] = keep_Q
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.weight_full)
            return new_top_Q, total_Q, add_values(unit, block_CH, first, place, keep_Q, sums)

        nothing = filled((ROWS,), NOTHING, PER_ROW), filled((ROWS,), 0.0, PER_ROW), _no_sums(options, SCORE)
        top_Q, total_Q, sums = lax.fori_loop(0, unit.block_count, score_block, nothing)
        factor_Q = 1.0 / total_Q
        plgpu.barrier_wait(refs.weight_empty)
        refs.factor_Q[...] = factor_Q
        refs.logsum_WQ[unit.index] = top_Q + jnp.log2(total_Q)
        plgpu.barrier_arrive(refs.weight_full)
        _store(refs, options, SCORE, unit, factor_Q, sums)

    _each_unit(refs, options, score_unit)
    plgpu.barrier_wait(refs.weight_empty)


def _value_units(refs: _Refs, options: Options, *, is_simulated: bool) -> None:
    """The other value columns."""
    plgpu.set_max_registers(MATH_REGISTERS, action="increase")
    plgpu.barrier_arrive(refs.q_empty)
    plgpu.barrier_arrive(refs.weight_empty)
    add_values = functools.partial(_add_values, refs, options, VALUE, is_simulated=is_simulated)

    def value_unit(unit: _Unit, turn: Array) -> None:
        def value_block(block: Array, sums: Sums) -> Sums:
            place, first = lax.rem(turn + block, options.stages), unit.begin + block * SLOTS
            block_CH = _numbers(refs, options, VALUE, turn + block)
            if refs.k_wide is not None:
                plgpu.commit_smem()
                plgpu.barrier_arrive(refs.k_empty.at[place])
                plgpu.barrier_arrive(refs.wide_full)
            plgpu.barrier_wait(refs.weight_full)
            factor_Q = plgpu.load(refs.factor_Q, layout=PER_ROW, optimized=False)
            sums = add_values(unit, block_CH, first, place, factor_Q, sums)
            plgpu.barrier_arrive(refs.weight_empty)
            return sums

        sums = lax.fori_loop(0, unit.block_count, value_block, _no_sums(options, VALUE))
        plgpu.barrier_wait(refs.weight_full)
        factor_Q = plgpu.load(refs.factor_Q, layout=PER_ROW, optimized=False)
        plgpu.barrier_arrive(refs.weight_empty)
        _store(refs, options, VALUE, unit, factor_Q, sums)

    _each_unit(refs, options, value_unit)


def _mask(score_QC: Array, options: Options, unit: _Unit, first: Array) -> Array:
    """Scores with NOTHING where a row does not see a slot; free where every row sees the whole block.

    A row may see nothing of a whole piece: its log-sum-exp is then so small that the combining kernel drops it.
    """

    def masked() -> Array:
        last_Q = plgpu.layout_cast(jnp.full((ROWS,), jnp.minimum(unit.newest + 1, unit.end) - first), PER_ROW)
        if options.tokens > 1:
            row_Q = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
            newest_Q = lax.div(row_Q, jnp.full_like(row_Q, options.heads)) + (unit.newest + 1 - first)
            last_Q = jnp.minimum(newest_Q, unit.end - first)
        slot_QC = plgpu.broadcasted_iota(jnp.int32, (ROWS, SLOTS), 1, layout=MATRIX)
        return jnp.where(slot_QC < along(last_Q, 0, (ROWS, SLOTS)), score_QC, NOTHING)

    return lax.cond(first + SLOTS > jnp.minimum(unit.newest + 1, unit.end), masked, lambda: score_QC)


def _no_sums(options: Options, warpgroup: int) -> Sums:
    columns = len(options.columns(warpgroup))
    widths = [min(WGMMA_COLUMNS_MAX, columns - first) for first in range(0, columns, WGMMA_COLUMNS_MAX)]
    return tuple(filled((ROWS, width), 0.0, MATRIX) for width in widths)


def _add_values(
    refs: _Refs, options: Options, warpgroup: int, unit: _Unit, block_CH: Ref, first: Array, place: Array,
    factor_Q: Array, sums: Sums, *, is_simulated: bool,
) -> Sums:
    """factor * sum + P V of a warpgroup's columns, whose block is then free; of codes it is already.

    The simulator of jax 0.11 takes no accumulator that begins with a value; there the sum is added after.
    """
    columns = options.columns(warpgroup)
    own_CH = block_CH.at[:, pl.ds(columns.start, len(columns))]
    pl.when(first + SLOTS > unit.end)(lambda: mosaic.clear_outside(own_CH, first, unit.begin, unit.end))
    added, begin = [], columns.start
    for sum_QH in sums:
        value_CH = block_CH.at[:, pl.ds(begin, sum_QH.shape[1])]
        begin += sum_QH.shape[1]
        sum_QH *= along(factor_Q, 0, sum_QH.shape)
        if is_simulated:
            sum_QH += mosaic.product(sum_QH.shape, refs.weight_QC, value_CH)
        else:
            sum_QH = pl.run_state(functools.partial(_accumulate, refs.weight_QC, value_CH))(plgpu.ACC.init(sum_QH))
        added.append(sum_QH)
    if refs.k_wide is None:
        plgpu.barrier_arrive(refs.k_empty.at[place])
    return tuple(added)


def _accumulate(weight_QC: Ref, value_CH: Ref, total_QH: Ref) -> None:
    plgpu.wgmma(total_QH, weight_QC, value_CH)


def _store(refs: _Refs, options: Options, warpgroup: int, unit: _Unit, factor_Q: Array, sums: Sums) -> None:
    """A warpgroup's columns of a unit's output, through the shared memory of its queries, which nobody reads any more.

    A tile of columns at once: the sums hold half of the registers.
    """
    own_QH = (refs.score_1QH if warpgroup == SCORE else refs.value_1QH).at[0]
    columns = options.columns(warpgroup)
    factor = along(factor_Q, 0, (ROWS, TILE))
    to = 0
    for sum_QH in sums:
        for column in range(0, sum_QH.shape[1], TILE):
            part = lax.slice(sum_QH, (0, column), (ROWS, column + TILE)) * factor
            own_QH[:, pl.ds(to, TILE)] = part.astype(own_QH.dtype)
            to += TILE
    plgpu.commit_smem()
    each, out, size = options.rows // options.tokens, refs.out_W[unit.index], refs.size_W[unit.index]
    for token in range(options.tokens):
        rows = pl.ds(pl.multiple_of(out + token * each, 8), each)

        @pl.when(token < size)
        def _(token: int = token, rows: Any = rows) -> None:
            part_QH = own_QH.at[pl.ds(token * each, each)]
            plgpu.copy_smem_to_gmem(part_QH, refs.out_QH.at[rows, pl.ds(columns.start, len(columns))])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.q_empty)
