"""Reading chunks of context out of pages, for the XLA paths.

Knows page tables and slots; knows no query and no mask. Ids out of range are clipped: what they bring is masked by
the caller, who knows the lengths.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

CHUNK_SLOTS = 256     # context slots read at once; measured, see docs/log.md


def chunk_page_count(page_size: int, pages_max: int) -> int:
    """Pages of one chunk: a function of the pool's geometry only, so a sequence is cut the same way in every batch."""
    return max(1, min(CHUNK_SLOTS // page_size, pages_max))


def read_chunk(pages_PKSH: Array, page_BM: Array) -> Array:
    """Context [B, K, C, H] of C = M * S consecutive slots from M pages a row, as stored.

    One (page, head) is contiguous, so gathering those gives heads outside slots with no transposition after.
    """
    P, K, S, H = pages_PKSH.shape
    B, M = page_BM.shape
    flat_BKM = jnp.clip(page_BM, 0, P - 1)[:, None, :] * K + jnp.arange(K, dtype=jnp.int32)[None, :, None]
    chunk_BKMC = pages_PKSH.reshape(P * K, S * H).at[flat_BKM].get(mode="promise_in_bounds")
    return chunk_BKMC.reshape(B, K, M * S, H)
