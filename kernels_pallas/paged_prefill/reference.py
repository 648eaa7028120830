"""The specification of prefill attention: a tile is consecutive tokens at consecutive positions of its row."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized import Pages
from kernels_pallas.reference import attend_tokens, numbers
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
    k_PKSH = numbers(k_PKSH, q_TNH.dtype)
    v_PKSH = None if v_PKSH is None else numbers(v_PKSH, q_TNH.dtype)
    T = q_TNH.shape[0]
    offset_Q = jnp.arange(TILE_TOKENS)
    is_real_WQ = offset_Q < work.tile_size_W[:, None]
    token_WQ = jnp.where(is_real_WQ, work.tile_token_W[:, None] + offset_Q, T)
    row_WQ = jnp.broadcast_to(work.tile_row_W[:, None], token_WQ.shape)
    row_T = jnp.zeros(T, jnp.int32).at[token_WQ].set(row_WQ, mode="drop")
    position_T = jnp.zeros(T, jnp.int32).at[token_WQ].set(work.tile_position_W[:, None] + offset_Q, mode="drop")
    is_tiled_T = jnp.zeros(T, bool).at[token_WQ].set(True, mode="drop")
    out_TNH = attend_tokens(
        q_TNH, k_PKSH, v_PKSH, page_RM, row_T, position_T, scale=scale, window=window, soft_cap=soft_cap, sink_N=sink_N,
        value_dim=value_dim,
    )
    return jnp.where(is_tiled_T[:, None, None], out_TNH, 0)
