"""Prefill attention in plain XLA, made for CPUs.

Loop: tiles of consecutive query tokens of one sequence, and for each tile chunks of its context from the window's
start to its causal frontier; both trip counts are data. Work of one turn: gather 2 x [K, chunk, H], two batched dots
of [tile * G, H] x [H, chunk], one step of online softmax. The bound is the speed of the dots.
Invariant: chunks start at fixed positions; every output token is written by its own tile only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import pages, softmax
from kernels_pallas.quantized import Pages
from kernels_pallas.work import TILE_TOKENS, AttentionWork


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
) -> Array:
    """See `api.paged_prefill`."""
    T, N, H = q_TNH.shape
    _, K, S, _ = k_PKSH.shape
    value_dim = H if value_dim is None else value_dim
    M = page_RM.shape[1]
    G = N // K
    chunk_pages = pages.chunk_page_count(S, M)
    chunk = chunk_pages * S
    # A tile's slice may run past the last token: padding keeps dynamic_slice from clamping its start.
    q_TKGH = jnp.pad(q_TNH, ((0, TILE_TOKENS), (0, 0), (0, 0))).reshape(T + TILE_TOKENS, K, G, H)
    sink_KQ = None if sink_N is None else jnp.tile(sink_N.reshape(K, G), (1, TILE_TOKENS))

    def attend_tile(tile: Array, out_TKGH: Array) -> Array:
        first = work.tile_token_W[tile]
        position_Q = work.tile_position_W[tile] + jnp.arange(TILE_TOKENS, dtype=jnp.int32)
        position_Q = jnp.repeat(position_Q, G)
        table_M = page_RM.at[work.tile_row_W[tile]].get(mode="clip")
        q_QKGH = lax.dynamic_slice_in_dim(q_TKGH, first, TILE_TOKENS)
        q_BKQH = q_QKGH.transpose(1, 0, 2, 3).reshape(1, K, TILE_TOKENS * G, H)
        end = work.tile_position_W[tile] + work.tile_size_W[tile]
        begin = 0 if window is None else jnp.maximum(work.tile_position_W[tile] - window + 1, 0)

        def attend_chunk(turn: Array, state: softmax.SoftmaxState) -> softmax.SoftmaxState:
            index_M = jnp.minimum(turn * chunk_pages + jnp.arange(chunk_pages, dtype=jnp.int32), M - 1)
            position_C = turn * chunk + jnp.arange(chunk, dtype=jnp.int32)
            is_seen_QC = position_C <= position_Q[:, None]
            if window is not None:
                is_seen_QC &= position_C > position_Q[:, None] - window
            keys = pages.read_chunk(k_PKSH, table_M[None, index_M], q_TNH.dtype)
            is_held_C = (position_C >= begin) & (position_C < end)
            values = pages.cleared(pages.read_values(v_PKSH, table_M[None, index_M], keys, value_dim), is_held_C[None])
            return softmax.add_chunk(state, q_BKQH, keys, values, is_seen_QC, scale=scale, soft_cap=soft_cap)

        state = softmax.start(1, K, TILE_TOKENS * G, value_dim, sink_KQ)
        state = lax.fori_loop(begin // chunk, (end + chunk - 1) // chunk, attend_chunk, state)
        out_KQGH = softmax.finish(state).astype(out_TKGH.dtype).reshape(K, TILE_TOKENS, G, value_dim)
        # Rows past the tile's size hold a neighbour's tokens: a later tile (or nobody, for padding) writes those.
        return lax.dynamic_update_slice_in_dim(out_TKGH, out_KQGH.transpose(1, 0, 2, 3), first, 0)

    with jax.named_scope("paged_prefill"):
        out_TKGH = lax.fori_loop(0, work.tile_count, attend_tile, jnp.zeros_like(q_TKGH[..., :value_dim]))
        out_TNH = out_TKGH[:T].reshape(T, N, value_dim)
        tile_last = jnp.maximum(work.tile_count - 1, 0)
        end = work.tile_token_W[tile_last] + work.tile_size_W[tile_last]
        token_T = jnp.arange(T, dtype=jnp.int32)
        return jnp.where(((token_T >= work.tile_token_W[0]) & (token_T < end))[:, None, None], out_TNH, 0)
