"""Prefill attention through Pallas:Triton, for CUDA from Ampere on and ROCm: a portable baseline. Not yet run.

Grid (parts of the plan's tiles, kv heads). A part is ROWS / G query tokens of one sequence times the G heads of a kv
head; over a latent cache, whose keys are values too, rows are 32 and programs of one token's heads are neighbours. A
program loops over its context 64 or 32 slots at a time, from its window's start to its causal frontier.
Queries and outputs are read and written where they lie: nothing is transposed or padded.
Traffic: 2 * H * itemsize bytes a context slot, kv head and part, mostly from the L2 cache. Roofline: the tensor cores.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import portable
from kernels_pallas.portable import ANYWHERE, NOTHING, Ref, Softmax
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.work import TILE_TOKENS, AttentionWork

ROWS = 64        # (token, head) rows of a part, of narrower heads twice as many
STAGES = 2


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
    is_interpreted: bool = False,
) -> Array:
    """See `api.paged_prefill`. `is_interpreted` runs the kernel's operations one by one, anywhere; for tests."""
    T, N, H = q_TNH.shape
    K = k_PKSH.shape[1]
    group, tiles = N // K, work.tile_row_W.shape[0]
    rows = ROWS if value_dim is None else portable.LATENT_ROWS
    blocks = 1 if value_dim is None else pl.cdiv(group, rows)
    heads = pl.cdiv(group, blocks)     # of a program
    part_tokens = min(TILE_TOKENS, 1 << max(0, (rows // heads).bit_length() - 1))
    parts = TILE_TOKENS // part_tokens
    sinks_N = jnp.full(N, NOTHING, jnp.float32) if sink_N is None else sink_N.astype(jnp.float32) * portable.LOG2E
    pools = jax.tree.leaves((k_PKSH, v_PKSH))
    attend = functools.partial(
        _attend, scale=scale, soft_cap=soft_cap, is_quantized=isinstance(k_PKSH, QuantizedPages), window=window,
        group=group, heads=heads, blocks=blocks, part_tokens=part_tokens, value_dim=value_dim,
    )
    out_TNH = pl.pallas_call(
        attend, grid=(tiles * parts, K * blocks), in_specs=[ANYWHERE] * (len(pools) + 7), out_specs=ANYWHERE,
        out_shape=jax.ShapeDtypeStruct((T, N, H if value_dim is None else value_dim), q_TNH.dtype),
        interpret=is_interpreted,
        compiler_params=plt.CompilerParams(num_warps=4 if H < 128 else 8, num_stages=STAGES),
        name="paged_prefill_attend",
    )(
        *pools, q_TNH, page_RM, sinks_N, work.tile_token_W, work.tile_row_W, work.tile_position_W, work.tile_size_W
    )
    last = jnp.maximum(work.tile_count - 1, 0)
    token_T = jnp.arange(T, dtype=jnp.int32)
    is_real_T = (token_T >= work.tile_token_W[0]) & (token_T < work.tile_token_W[last] + work.tile_size_W[last])
    return jnp.where(is_real_T[:, None, None], out_TNH, 0)


def _attend(
    *refs: Ref, scale: float, soft_cap: float | None, is_quantized: bool, window: int | None, group: int,
    heads: int, blocks: int, part_tokens: int, value_dim: int | None,
) -> None:
    keys, values, rest = portable.unpack(refs, is_quantized, is_latent=value_dim is not None)
    q_TNH, table_RM, sink_N, token_W, row_W, position_W, size_W, out_TNH = rest
    parts = TILE_TOKENS // part_tokens
    tile, offset = pl.program_id(0) // parts, pl.program_id(0) % parts * part_tokens
    head, part, size = pl.program_id(1) // blocks, pl.program_id(1) % blocks, size_W[tile] - offset

    @pl.when(size > 0)
    def _() -> None:
        head_dim, rows = q_TNH.shape[2], portable.padded(part_tokens * heads)
        slots = portable.turn_slots(head_dim)
        row_Q = jnp.arange(rows)
        offset_Q, member_Q = row_Q // heads, part * heads + row_Q % heads
        is_real_Q = (offset_Q < jnp.minimum(size, part_tokens)) & (member_Q < group)
        head_Q = jnp.where(member_Q < group, head * group + member_Q, 0)
        token_Q = token_W[tile] + offset + offset_Q

        def place(first: int, width: int) -> tuple[tuple[Array, ...], Array]:
            column_H = first + jnp.arange(width)[None, :]
            return (token_Q[:, None], head_Q[:, None], column_H), jnp.broadcast_to(is_real_Q[:, None], (rows, width))

        queries = []
        for columns in portable.parts(head_dim, value_dim):
            own, mask_QH = place(*columns)
            queries.append(plt.load(q_TNH.at[own], mask=mask_QH, other=jnp.zeros((), q_TNH.dtype)))
        width = queries[0].shape[1]
        position = position_W[tile] + offset
        end, end_Q = position + jnp.minimum(size, part_tokens), position + offset_Q + 1
        begin = 0 if window is None else jnp.maximum(position - window + 1, 0)
        begin_Q = jnp.zeros_like(end_Q) if window is None else end_Q - window

        def add(turn: Array, state: Softmax) -> Softmax:
            slot_C = turn * slots + jnp.arange(slots)
            is_held_C = (slot_C >= begin) & (slot_C < end)
            return portable.add_context(
                state, tuple(queries), keys, values, table_RM, row_W[tile], head, slot_C, is_held_C, begin_Q, end_Q,
                scale=scale, soft_cap=soft_cap,
            )

        sink_Q = plt.load(sink_N.at[head_Q], mask=is_real_Q, other=NOTHING)
        start = portable.start(sink_Q, width)
        state = lax.fori_loop(begin // slots, pl.cdiv(end, slots), add, start)
        total_Q = jnp.where(state.total_Q > 0, state.total_Q, 1.0)     # rows of no token saw nothing
        own, mask_QH = place(0, width)
        plt.store(out_TNH.at[own], (state.sum_QH / total_Q[:, None]).astype(out_TNH.dtype), mask=mask_QH)
