"""Reading chunks of context out of pages, for the XLA paths.

Knows page tables, slots and how values are stored; knows no query. Ids out of range are clipped: what they bring is
masked by the caller, who knows the lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.quantized import Pages, QuantizedPages, code_numbers
from kernels_pallas.storage import from_storage

CHUNK_SLOTS = 256     # context slots read at once; measured, see docs/log.md


def chunk_page_count(page_size: int, pages_max: int) -> int:
    """Pages of one chunk: a function of the pool's geometry only, so a sequence is cut the same way in every batch."""
    return max(1, min(CHUNK_SLOTS // page_size, pages_max))


class Chunk(NamedTuple):
    """Consecutive context slots of some rows; numbers are to be multiplied by their slot's scale, if there is one."""

    number_BKCH: Array
    scale_BKC: Array | None


def read_chunk(pages: Pages, page_BM: Array, dtype: DTypeLike) -> Chunk:
    """C = M * S consecutive slots from M pages a row.

    Args:
      dtype: of the numbers; every code is exact in it.
    """
    if isinstance(pages, QuantizedPages):
        scale_BKC1 = _gather(pages.scale_PKS[..., None], page_BM)
        code_BKCH = code_numbers(_gather(pages.code_PKSH, page_BM), dtype)
        return Chunk(code_BKCH, scale_BKC1[..., 0].astype(jnp.float32))
    return Chunk(from_storage(_gather(pages, page_BM), dtype), None)


def read_values(pages: Pages | None, page_BM: Array, keys: Chunk, value_dim: int) -> Chunk:
    """Values of the same slots: from pages of their own, or the first numbers of the keys (a latent cache)."""
    if pages is None:
        return Chunk(keys.number_BKCH[..., :value_dim], keys.scale_BKC)
    return read_chunk(pages, page_BM, keys.number_BKCH.dtype)


def cleared(chunk: Chunk, is_held_BC: Array) -> Chunk:
    """Zero in slots that are not held: those may be NaN, and 0 * NaN is NaN."""
    scale_BKC = chunk.scale_BKC
    return Chunk(
        jnp.where(is_held_BC[:, None, :, None], chunk.number_BKCH, 0),
        None if scale_BKC is None else jnp.where(is_held_BC[:, None], scale_BKC, 0),
    )


def _gather(pages_PKSH: Array, page_BM: Array) -> Array:
    """Slots [B, K, C, H] as stored.

    One (page, head) is contiguous, so gathering those gives heads outside slots with no transposition after.
    """
    P, K, S, H = pages_PKSH.shape
    B, M = page_BM.shape
    flat_BKM = jnp.clip(page_BM, 0, P - 1)[:, None, :] * K + jnp.arange(K, dtype=jnp.int32)[None, :, None]
    chunk_BKMC = pages_PKSH.reshape(P * K, S * H).at[flat_BKM].get(mode="promise_in_bounds")
    return chunk_BKMC.reshape(B, K, M * S, H)
