"""Decode attention in plain XLA, made for CPUs.

Loop: blocks of rows of similar length, and for each block chunks of its context up to its longest row; both trip
counts are data. Work of one turn: gather 2 x [rows, K, chunk, H], two batched dots, one step of online softmax.
Traffic: every page of a block once per (longest row of the block), read, written and read again by the dots; the
bound is memory bandwidth (a gathered chunk of 8 rows x 256 slots stays in the L2 cache).
Invariant: chunks start at fixed positions, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import pages, softmax
from kernels_pallas.paged_decode.slots import gather, repeated_sinks, scatter
from kernels_pallas.quantized import Pages
from kernels_pallas.work import AttentionWork, decode_block_size


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
) -> Array:
    """See `api.paged_decode`."""
    _, K, S, H = k_PKSH.shape
    value_dim = H if value_dim is None else value_dim
    M = page_RM.shape[1]
    slots = work.decode_token_W.shape[0]
    block = decode_block_size(slots)
    chunk_pages = pages.chunk_page_count(S, M)
    chunk = chunk_pages * S
    q_WKGH = gather(q_TNH, work, K, tokens)
    group = q_WKGH.shape[2]
    sink_KG = repeated_sinks(sink_N, K, tokens)

    def attend_block(index: Array, out_WKGH: Array) -> Array:
        first = index * block
        q_BKGH = lax.dynamic_slice_in_dim(q_WKGH, first, block)
        length_B = lax.dynamic_slice_in_dim(work.decode_length_W, first, block)
        row_B = lax.dynamic_slice_in_dim(work.decode_row_W, first, block)
        begin_B = jnp.zeros_like(length_B)
        if window is not None:
            begin_B = jnp.maximum(length_B - (tokens - 1) - window, 0)
        table_BM = page_RM.at[row_B].get(mode="clip")

        def attend_chunk(turn: Array, state: softmax.SoftmaxState) -> softmax.SoftmaxState:
            index_M = jnp.minimum(turn * chunk_pages + jnp.arange(chunk_pages, dtype=jnp.int32), M - 1)
            page_BM = table_BM[:, index_M]
            position_C = turn * chunk + jnp.arange(chunk, dtype=jnp.int32)
            is_held_BC = (position_C < length_B[:, None]) & (position_C >= begin_B[:, None])
            is_seen_BGC = _seen(is_held_BC, position_C, length_B, group, tokens, window)
            keys = pages.read_chunk(k_PKSH, page_BM, q_TNH.dtype)
            values = pages.cleared(pages.read_values(v_PKSH, page_BM, keys, value_dim), is_held_BC)
            return softmax.add_chunk(
                state, q_BKGH, keys, values, is_seen_BGC[:, None], scale=scale, soft_cap=soft_cap
            )

        # Padding rows have length 0: they see nothing and must not pull the beginning of the block to 0.
        begin = jnp.min(jnp.where(length_B > 0, begin_B, jnp.iinfo(jnp.int32).max)) // chunk
        end = (jnp.max(length_B) + chunk - 1) // chunk
        state = softmax.start(block, K, group, value_dim, sink_KG)
        out_BKGH = softmax.finish(lax.fori_loop(begin, end, attend_chunk, state)).astype(out_WKGH.dtype)
        return lax.dynamic_update_slice_in_dim(out_WKGH, out_BKGH, first, 0)

    with jax.named_scope("paged_decode"):
        block_count = (work.decode_count + block - 1) // block
        out_WKGH = lax.fori_loop(0, block_count, attend_block, jnp.zeros_like(q_WKGH[..., :value_dim]))
        return scatter(out_WKGH, work, q_TNH.shape[0], tokens)


def _seen(
    is_held_BC: Array, position_C: Array, length_B: Array, group: int, tokens: int, window: int | None
) -> Array:
    """Which slots each query of a group sees, of those that the entry's tokens see together."""
    if tokens == 1:
        return is_held_BC[:, None]
    before_G = jnp.repeat(jnp.arange(tokens - 1, -1, -1, dtype=jnp.int32), group // tokens)
    end_BG1 = (length_B[:, None] - before_G)[..., None]
    is_seen_BGC = is_held_BC[:, None] & (position_C < end_BG1)
    return is_seen_BGC if window is None else is_seen_BGC & (position_C >= end_BG1 - window)
