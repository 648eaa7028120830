"""Decode attention through Pallas:Triton, for CUDA from Ampere on and ROCm: a portable baseline. Not yet run.

Two kernels, cut as on Hopper: grid (pieces of contexts, kv heads), a program loops over its piece, 64 or 32 slots at a
time, and leaves its normalised output and log-sum-exp; grid (decode slots, kv heads) weighs the pieces and takes in
sinks.
Rows of a program are the tokens * G queries of a kv head, at least 16 for the tensor cores; over a latent cache, whose
keys are values too, at most 32, and programs that share a piece are neighbours.
Traffic: 2 * H * itemsize bytes a context slot and kv head, gathered by loads, each read once. Roofline: memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import portable
from kernels_pallas.paged_decode.slots import gather, repeated_sinks, scatter
from kernels_pallas.portable import ANYWHERE, NOTHING, Ref, Softmax
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.work import AttentionWork

WARPS, STAGES = 4, 3
LATENT_WARPS, LATENT_STAGES = 8, 2


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
    is_interpreted: bool = False,
) -> Array:
    """See `api.paged_decode`. `is_interpreted` runs the kernels' operations one by one, anywhere; for tests."""
    T, N, H = q_TNH.shape
    K, slots, pieces = k_PKSH.shape[1], work.decode_token_W.shape[0], work.piece_slot_W.shape[0]
    group, width = N // K * tokens, H if value_dim is None else value_dim
    block = portable.padded(group) if value_dim is None else min(portable.padded(group), portable.LATENT_ROWS)
    blocks = pl.cdiv(group, block)
    rows = block * blocks
    q_WKGH = jnp.pad(gather(q_TNH, work, K, tokens), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    sink_KG = jnp.full((K, rows), NOTHING, jnp.float32)
    if sink_N is not None:
        sink_KG = sink_KG.at[:, :group].set(repeated_sinks(sink_N.astype(jnp.float32) * portable.LOG2E, K, tokens))
    static = {"tokens": tokens, "heads": N // K, "window": window, "value_dim": value_dim}
    call = functools.partial(pl.pallas_call, interpret=is_interpreted)
    pools = jax.tree.leaves((k_PKSH, v_PKSH))
    attend = functools.partial(
        _attend, block=block, scale=scale, soft_cap=soft_cap, is_quantized=isinstance(k_PKSH, QuantizedPages), **static
    )
    partial_WKGH, logsum_WKG = call(
        attend, grid=(pieces, K * blocks), in_specs=[ANYWHERE] * (len(pools) + 7), out_specs=[ANYWHERE] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((pieces, K, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((pieces, K, rows), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(
            num_warps=WARPS if value_dim is None else LATENT_WARPS,
            num_stages=STAGES if value_dim is None else LATENT_STAGES,
        ),
        name="paged_decode_attend",
    )(
        *pools, q_WKGH, page_RM, work.decode_row_W, work.decode_length_W, work.piece_slot_W, work.piece_begin_W,
        work.piece_end_W,
    )
    out_WKGH = call(
        functools.partial(_combine, block=block, reach=None if window is None else window + tokens - 1),
        grid=(slots, K * blocks),
        in_specs=[ANYWHERE] * 6, out_specs=ANYWHERE,
        out_shape=jax.ShapeDtypeStruct((slots, K, rows, width), q_TNH.dtype),
        compiler_params=plt.CompilerParams(num_warps=2 if value_dim is None else LATENT_WARPS, num_stages=1),
        name="paged_decode_combine",
    )(partial_WKGH, logsum_WKG, sink_KG, work.decode_piece_W, work.piece_end_W, work.decode_length_W)
    return scatter(out_WKGH[:, :, :group], work, T, tokens)


def _attend(
    *refs: Ref, block: int, scale: float, soft_cap: float | None, is_quantized: bool, tokens: int, heads: int,
    window: int | None, value_dim: int | None,
) -> None:
    keys, values, rest = portable.unpack(refs, is_quantized, is_latent=value_dim is not None)
    q_WKGH, table_RM, row_W, length_W, slot_W, begin_W, end_W, partial_WKGH, logsum_WKG = rest
    piece, blocks = pl.program_id(0), q_WKGH.shape[2] // block
    head, part = pl.program_id(1) // blocks, pl.program_id(1) % blocks
    slot, begin, end = slot_W[piece], begin_W[piece], end_W[piece]
    length, row = length_W[slot], row_W[slot]
    if window is not None:
        begin = jnp.maximum(begin, length - (window + tokens - 1))

    @pl.when(begin < end)     # neither past the last piece nor before the window
    def _() -> None:
        head_dim = q_WKGH.shape[3]
        slots = portable.turn_slots(head_dim)
        row_G = part * block + jnp.arange(block)
        queries = tuple(
            plt.load(q_WKGH.at[slot, head, row_G[:, None], first + jnp.arange(width)[None, :]])
            for first, width in portable.parts(head_dim, value_dim)
        )
        end_G = length - (tokens - 1) + jnp.minimum(row_G // heads, tokens - 1)
        begin_G = jnp.zeros_like(end_G) if window is None else end_G - window

        def add(turn: Array, state: Softmax) -> Softmax:
            slot_C = begin + turn * slots + jnp.arange(slots)
            return portable.add_context(
                state, queries, keys, values, table_RM, row, head, slot_C, slot_C < end, begin_G, end_G,
                scale=scale, soft_cap=soft_cap,
            )

        nothing = portable.start(jnp.full((block,), NOTHING, jnp.float32), queries[0].shape[1])
        state = lax.fori_loop(0, pl.cdiv(end - begin, slots), add, nothing)
        # A token may see nothing of a piece: then it has no weight.
        total_G = jnp.where(state.total_Q > 0, state.total_Q, 1.0)
        column_H = jnp.arange(queries[0].shape[1])[None, :]
        plt.store(partial_WKGH.at[piece, head, row_G[:, None], column_H], state.sum_QH / total_G[:, None])
        plt.store(logsum_WKG.at[piece, head, row_G], state.top_Q + jnp.log2(total_G))


def _combine(
    partial_WKGH: Ref, logsum_WKG: Ref, sink_KG: Ref, first_W: Ref, end_W: Ref, length_W: Ref, out_WKGH: Ref, *,
    block: int, reach: int | None,
) -> None:
    rows, head_dim = partial_WKGH.shape[2:]
    slot, blocks = pl.program_id(0), rows // block
    head, row_G = pl.program_id(1) // blocks, pl.program_id(1) % blocks * block + jnp.arange(block)
    column_H = jnp.arange(head_dim)[None, :]
    unseen = 0 if reach is None else length_W[slot] - reach

    def add(piece: Array, state: Softmax) -> Softmax:
        is_live = end_W[piece] > unseen      # nobody wrote a piece before the window
        mask_G, mask_GH = jnp.full((block,), is_live), jnp.full((block, head_dim), is_live)
        log_G = plt.load(logsum_WKG.at[piece, head, row_G], mask=mask_G, other=NOTHING)
        part_GH = plt.load(partial_WKGH.at[piece, head, row_G[:, None], column_H], mask=mask_GH, other=0.0)
        top_G = jnp.maximum(state.top_Q, log_G)
        keep_G, weight_G = jnp.exp2(state.top_Q - top_G), jnp.where(log_G > NOTHING, jnp.exp2(log_G - top_G), 0.0)
        sum_GH = state.sum_QH * keep_G[:, None] + part_GH * weight_G[:, None]
        return Softmax(top_G, state.total_Q * keep_G + weight_G, sum_GH)

    sinks = portable.start(plt.load(sink_KG.at[head, row_G]), head_dim)
    state = lax.fori_loop(first_W[slot], first_W[slot + 1], add, sinks)
    total_G = jnp.where(state.total_Q > 0, state.total_Q, 1.0)
    out_GH = (state.sum_QH / total_G[:, None]).astype(out_WKGH.dtype)
    plt.store(out_WKGH.at[slot, head, row_G[:, None], column_H], out_GH)
