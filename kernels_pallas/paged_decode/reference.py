"""The specification of decode attention: each decode slot's token is the newest position of its row."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized import Pages
from kernels_pallas.reference import attend_tokens, numbers
from kernels_pallas.work import AttentionWork


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
    k_PKSH = numbers(k_PKSH, q_TNH.dtype)
    v_PKSH = None if v_PKSH is None else numbers(v_PKSH, q_TNH.dtype)
    is_real_W = jnp.arange(work.decode_token_W.shape[0]) < work.decode_count
    out_TNH = jnp.zeros_like(q_TNH[..., :value_dim])
    for index in range(tokens):
        token_W = work.decode_token_W + index
        out_WNH = attend_tokens(
            q_TNH.at[token_W].get(mode="clip"), k_PKSH, v_PKSH, page_RM, work.decode_row_W,
            work.decode_length_W - tokens + index, scale=scale, window=window, soft_cap=soft_cap, sink_N=sink_N,
            value_dim=value_dim,
        )
        out_TNH = out_TNH.at[jnp.where(is_real_W, token_W, q_TNH.shape[0])].set(out_WNH, mode="drop")
    return out_TNH
