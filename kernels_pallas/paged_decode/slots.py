"""Queries of decode slots out of packed tokens, and their outputs back: the same for every implementation.

Knows where the plan put which token; knows no page and no softmax.
Invariant: the queries of a slot's tokens lie side by side as one group of a kv head, older tokens first.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas.work import AttentionWork


def gather(q_TNH: Array, work: AttentionWork, kv_heads: int, tokens: int) -> Array:
    """Queries [slots, K, tokens * G, H]."""
    _, N, H = q_TNH.shape
    slots = work.decode_token_W.shape[0]
    token_WQ = work.decode_token_W[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    q_WQKGH = q_TNH.at[token_WQ].get(mode="clip").reshape(slots, tokens, kv_heads, N // kv_heads, H)
    return q_WQKGH.swapaxes(1, 2).reshape(slots, kv_heads, tokens * (N // kv_heads), H)


def scatter(out_WKGH: Array, work: AttentionWork, token_count: int, tokens: int) -> Array:
    """Outputs [token_count, N, H], zero for tokens that are no decode slot's."""
    slots, K, group, H = out_WKGH.shape
    N = K * group // tokens
    out_WQKGH = out_WKGH.reshape(slots, K, tokens, group // tokens, H).swapaxes(1, 2)
    out_WQNH = out_WQKGH.at[work.decode_slot_W].get(mode="clip").reshape(slots * tokens, N, H)
    out_TNH = jnp.pad(out_WQNH, ((0, max(0, token_count - slots * tokens)), (0, 0), (0, 0)))[:token_count]
    is_decode_T = jnp.arange(token_count, dtype=jnp.int32) < work.decode_count * tokens
    return jnp.where(is_decode_T[:, None, None], out_TNH, 0)


def repeated_sinks(sink_N: Array | None, kv_heads: int, tokens: int) -> Array | None:
    """Sinks [K, tokens * G], as the groups lie."""
    return None if sink_N is None else jnp.tile(sink_N.reshape(kv_heads, -1), (1, tokens))
