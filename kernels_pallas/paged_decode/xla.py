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
from kernels_pallas.quantized import Pages
from kernels_pallas.work import AttentionWork, decode_block_size


def paged_decode(
    q_TNH: Array,
    k_PKSH: Pages,
    v_PKSH: Pages,
    page_RM: Array,
    work: AttentionWork,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sink_N: Array | None,
) -> Array:
    """See `api.paged_decode`."""
    T, N, H = q_TNH.shape
    _, K, S, _ = k_PKSH.shape
    M = page_RM.shape[1]
    slots = work.decode_token_W.shape[0]
    block = decode_block_size(slots)
    chunk_pages = pages.chunk_page_count(S, M)
    chunk = chunk_pages * S
    q_WKGH = q_TNH.at[work.decode_token_W].get(mode="clip").reshape(slots, K, N // K, H)
    sink_KG = None if sink_N is None else sink_N.reshape(K, N // K)

    def attend_block(index: Array, out_WKGH: Array) -> Array:
        first = index * block
        q_BKGH = lax.dynamic_slice_in_dim(q_WKGH, first, block)
        length_B = lax.dynamic_slice_in_dim(work.decode_length_W, first, block)
        row_B = lax.dynamic_slice_in_dim(work.decode_row_W, first, block)
        begin_B = jnp.zeros_like(length_B) if window is None else jnp.maximum(length_B - window, 0)
        table_BM = page_RM.at[row_B].get(mode="clip")

        def attend_chunk(turn: Array, state: softmax.SoftmaxState) -> softmax.SoftmaxState:
            index_M = jnp.minimum(turn * chunk_pages + jnp.arange(chunk_pages, dtype=jnp.int32), M - 1)
            page_BM = table_BM[:, index_M]
            position_C = turn * chunk + jnp.arange(chunk, dtype=jnp.int32)
            is_seen_BC = (position_C < length_B[:, None]) & (position_C >= begin_B[:, None])
            keys = pages.read_chunk(k_PKSH, page_BM, q_TNH.dtype)
            values = pages.cleared(pages.read_chunk(v_PKSH, page_BM, q_TNH.dtype), is_seen_BC)
            return softmax.add_chunk(
                state, q_BKGH, keys, values, is_seen_BC[:, None, None, :], scale=scale, soft_cap=soft_cap
            )

        # Padding rows have length 0: they see nothing and must not pull the beginning of the block to 0.
        begin = jnp.min(jnp.where(length_B > 0, begin_B, jnp.iinfo(jnp.int32).max)) // chunk
        end = (jnp.max(length_B) + chunk - 1) // chunk
        state = softmax.start(block, K, N // K, H, sink_KG)
        out_BKGH = softmax.finish(lax.fori_loop(begin, end, attend_chunk, state)).astype(out_WKGH.dtype)
        return lax.dynamic_update_slice_in_dim(out_WKGH, out_BKGH, first, 0)

    with jax.named_scope("paged_decode"):
        block_count = (work.decode_count + block - 1) // block
        out_WKGH = lax.fori_loop(0, block_count, attend_block, jnp.zeros_like(q_WKGH))
        out_WNH = out_WKGH.at[work.decode_slot_W].get(mode="clip").reshape(slots, N, H)
        out_TNH = jnp.pad(out_WNH, ((0, max(0, T - slots)), (0, 0), (0, 0)))[:T]
        is_decode_T = jnp.arange(T, dtype=jnp.int32) < work.decode_count
        return jnp.where(is_decode_T[:, None, None], out_TNH, 0)
