"""Prefill attention over a latent cache on NVIDIA Hopper: parts of tiles by `latent.attend`, written where they belong.

A unit is a part of a tile: 64 // N consecutive query tokens of one sequence times all N heads, or 64 heads of one
token. Its results go to the rows of its tokens and no others, so nothing is gathered after.
Traffic: 2 * H bytes a context slot and part, from memory for the first part and from the L2 cache for those beside it.
Roofline: the L2 cache, see `kernels_pallas/latent.py`. Not yet run on hardware: see docs/kernels.md.

Blocks start at fixed positions and a part is one sequence's: a chunk gives the same bits whatever runs beside it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas import latent
from kernels_pallas.latent import Options, Units
from kernels_pallas.quantized import Pages
from kernels_pallas.work import TILE_TOKENS, AttentionWork


def paged_prefill(
    q_TNH: Array, k_PKSH: Pages, page_RM: Array, work: AttentionWork, *, scale: float, value_dim: int,
    interpret: Any = None, programs: int | None = None,
) -> Array:
    """See `api.paged_prefill`, without values. `interpret` runs the simulator, `programs` persistent programs."""
    T, N, _ = q_TNH.shape
    options = latent.options_of(N, tokens=TILE_TOKENS, value_dim=value_dim, scale=scale, programs=programs)
    with jax.named_scope("paged_prefill"):
        q_QH = latent.query_rows(q_TNH, options)
        out_QH, _ = latent.attend(q_QH, k_PKSH, page_RM, _units(work, options), options, T * options.heads, interpret)
        last = jnp.maximum(work.tile_count - 1, 0)
        token_T = jnp.arange(T, dtype=jnp.int32)
        is_real_T = (token_T >= work.tile_token_W[0]) & (token_T < work.tile_token_W[last] + work.tile_size_W[last])
        return jnp.where(is_real_T[:, None, None], latent.grouped(out_QH, N, options), 0)


def _units(work: AttentionWork, options: Options) -> Units:
    """Each tile's parts, in order."""
    parts = TILE_TOKENS // options.tokens * options.parts

    def spread(x_W: Array) -> Array:
        return jnp.repeat(x_W, parts)

    part_W = jnp.tile(jnp.arange(parts, dtype=jnp.int32), work.tile_row_W.size)
    offset_W = part_W // options.parts * options.tokens
    query_W = (spread(work.tile_token_W) + offset_W) * options.heads + part_W % options.parts * options.rows
    size_W = jnp.clip(spread(work.tile_size_W) - offset_W, 0, options.tokens)
    newest_W = spread(work.tile_position_W) + offset_W
    return Units(
        count=work.tile_count * parts, query_W=query_W, out_W=query_W, size_W=size_W, row_W=spread(work.tile_row_W),
        begin_W=jnp.zeros_like(size_W), end_W=jnp.where(size_W > 0, newest_W + size_W, 0), newest_W=newest_W,
    )
