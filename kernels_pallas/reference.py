"""What paged attention computes, in plain jnp: the specification shared by the references of both attention ops.

Knows tokens, rows and pages; knows nothing of how a step is cut into work items.
For every token the whole page table row is gathered and masked: right, and slow on purpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.quantized import Pages, QuantizedPages, dequantize
from kernels_pallas.storage import from_storage


def numbers(pages: Pages, dtype: DTypeLike) -> Array:
    """A pool as numbers; `dtype` is what uint16 bits stand for."""
    return dequantize(pages) if isinstance(pages, QuantizedPages) else from_storage(pages, dtype)


def attend_tokens(
    q_TNH: Array,
    k_PKSH: Array,
    v_PKSH: Array | None,
    page_RM: Array,
    row_T: Array,
    position_T: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_N: Array | None = None,
    value_dim: int | None = None,
) -> Array:
    """Each token attends to its row's positions in (position - window, position], in float32.

    Args:
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      sink_N: a logit a head that takes part in the softmax's denominator and has no value.
      value_dim: without v_PKSH, the first of a key's numbers that are its value.
    """
    T, N, H = q_TNH.shape
    _, K, S, _ = k_PKSH.shape
    page_TM = page_RM.at[row_T].get(mode="clip")
    with jax.default_matmul_precision("highest"):
        def gathered(pages_PKSH: Array) -> Array:
            pages_TMKSH = pages_PKSH.at[page_TM].get(mode="clip").astype(jnp.float32)
            return pages_TMKSH.transpose(0, 2, 1, 3, 4).reshape(T, K, -1, H)

        k_TKCH = gathered(k_PKSH)
        v_TKCH = k_TKCH[..., :value_dim] if v_PKSH is None else gathered(v_PKSH)
        q_TKGH = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H)
        score_TKGC = jnp.einsum("TKGH,TKCH->TKGC", q_TKGH, k_TKCH) * scale
        if soft_cap is not None:
            score_TKGC = soft_cap * jnp.tanh(score_TKGC / soft_cap)
        slot_C = jnp.arange(page_TM.shape[1] * S)
        is_seen_TC = slot_C <= position_T[:, None]
        if window is not None:
            is_seen_TC &= slot_C > position_T[:, None] - window
        is_seen_TKGC = is_seen_TC[:, None, None, :]
        score_TKGC = jnp.where(is_seen_TKGC, score_TKGC, -jnp.inf)
        top_TKG = score_TKGC.max(-1, keepdims=True)
        if sink_N is not None:
            sink_TKG = jnp.broadcast_to(sink_N.astype(jnp.float32).reshape(1, K, N // K, 1), top_TKG.shape)
            top_TKG = jnp.maximum(top_TKG, sink_TKG)
        weight_TKGC = jnp.exp(score_TKGC - top_TKG)
        total_TKG = weight_TKGC.sum(-1, keepdims=True)
        if sink_N is not None:
            total_TKG += jnp.exp(sink_TKG - top_TKG)
        v_TKCH = jnp.where(is_seen_TC[:, None, :, None], v_TKCH, 0)  # an unused slot may hold NaN, and 0 * NaN is NaN
        out_TKGH = jnp.einsum("TKGC,TKCH->TKGH", weight_TKGC / total_TKG, v_TKCH)
    return out_TKGH.reshape(T, N, -1).astype(q_TNH.dtype)
