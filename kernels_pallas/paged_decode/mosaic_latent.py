"""Decode attention over a latent cache on NVIDIA Hopper: pieces of contexts by `latent.attend`, then combined.

A unit is (piece, at most 64 rows of (token, head)); units of one piece are neighbours and share its pages through the
L2 cache. `combine`: one program a (decode slot, row) of one warpgroup weighs the pieces' outputs.
Traffic beside the context's: `attend` writes and `combine` reads 2 * value_dim bytes a piece and row, 64 KiB a piece
at 64 heads beside 288 KiB of the shortest piece. Pieces' outputs are rounded to the type of q, as the result is.
Roofline: memory, see `kernels_pallas/latent.py`. Not yet run on hardware: see docs/kernels.md.

What a sequence gives depends on how its context is cut, which depends on the batch: no bitwise batch invariance.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from kernels_pallas import latent, mosaic
from kernels_pallas.latent import Options, Units
from kernels_pallas.mosaic import NOTHING, Ref
from kernels_pallas.paged_decode.slots import gather, scatter
from kernels_pallas.quantized import Pages
from kernels_pallas.work import AttentionWork

PIECES_AT_ONCE = 4      # loads in flight of one combining program


def paged_decode(
    q_TNH: Array, k_PKSH: Pages, page_RM: Array, work: AttentionWork, *, scale: float, value_dim: int, tokens: int = 1,
    interpret: Any = None, programs: int | None = None,
) -> Array:
    """See `api.paged_decode`, without values. `interpret` runs the simulator, `programs` persistent programs."""
    T, N, H = q_TNH.shape
    options = latent.options_of(N, tokens=tokens, value_dim=value_dim, scale=scale, programs=programs)
    slots, pieces = work.decode_token_W.shape[0], work.piece_slot_W.shape[0]
    blocks = -(-tokens // options.tokens) * options.parts
    with jax.named_scope("paged_decode"):
        q_QH = latent.query_rows(gather(q_TNH, work, 1, tokens).reshape(slots * tokens, N, H), options)
        units = _units(work, blocks, tokens, options)
        rows = blocks * options.rows
        part_QH, unit_logsum_WQ = latent.attend(q_QH, k_PKSH, page_RM, units, options, pieces * rows, interpret)
        logsum_WQ = unit_logsum_WQ[:, : options.rows].reshape(pieces, rows)
        out_WQH = _combine(part_QH.reshape(pieces, rows, value_dim), logsum_WQ, work, slots, interpret)
        out_WQH = out_WQH[:, : tokens * options.heads]
        out_WKGH = latent.grouped(out_WQH, N, options).reshape(slots, 1, tokens * N, value_dim)
        return scatter(out_WKGH, work, T, tokens)


def _units(work: AttentionWork, blocks: int, tokens: int, options: Options) -> Units:
    """Each piece for each block of rows of its entry."""
    def spread(x_W: Array) -> Array:
        return jnp.repeat(x_W, blocks)

    slot_W, block_W = spread(work.piece_slot_W), jnp.tile(jnp.arange(blocks, dtype=jnp.int32), work.piece_slot_W.size)
    token_W = block_W * options.rows // options.heads
    return Units(
        count=work.piece_count * blocks,
        query_W=slot_W * (tokens * options.heads) + block_W * options.rows,
        out_W=jnp.arange(slot_W.size, dtype=jnp.int32) * options.rows,
        size_W=jnp.full(slot_W.shape, options.tokens, jnp.int32),
        row_W=work.decode_row_W[slot_W], begin_W=spread(work.piece_begin_W), end_W=spread(work.piece_end_W),
        newest_W=work.decode_length_W[slot_W] - tokens + token_W,
    )


def _combine(part_WQH: Array, logsum_WQ: Array, work: AttentionWork, slots: int, interpret: Any) -> Array:
    """Attention output [slots, rows, value_dim]; zero for slots past decode_count."""
    _, rows, width = part_WQH.shape

    def body(part: Ref, logsum: Ref, first_W: Ref, out: Ref) -> None:
        slot, row = lax.axis_index("slot"), lax.axis_index("row")
        begin, end = first_W[slot], first_W[slot + 1]

        def add(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sum_H = carry
            wanted = [begin + turn * PIECES_AT_ONCE + i for i in range(PIECES_AT_ONCE)]
            piece = [jnp.minimum(index, end - 1) for index in wanted]
            part_H = [part[i, row].astype(jnp.float32) for i in piece]
            log = [jnp.where(wanted[i] < end, logsum[piece[i], row], NOTHING) for i in range(PIECES_AT_ONCE)]
            new_top = top
            for one in log:
                new_top = jnp.maximum(new_top, one)
            keep = jnp.exp2(top - new_top)
            total, sum_H = total * keep, sum_H * keep
            for i in range(PIECES_AT_ONCE):
                # Nothing of a piece counted twice: NOTHING less any score of the first, which every row sees, is none.
                weight = jnp.exp2(log[i] - new_top)
                total, sum_H = total + weight, sum_H + part_H[i] * weight
            return new_top, total, sum_H

        start = jnp.float32(NOTHING), jnp.float32(0), jnp.zeros((width,), jnp.float32)
        _, total, sum_H = lax.fori_loop(0, pl.cdiv(end - begin, PIECES_AT_ONCE), add, start)
        factor = 1.0 / jnp.where(total > 0, total, 1.0)
        out[slot, row] = (sum_H * factor).astype(part_WQH.dtype)

    return mosaic.launch(
        body, part_WQH, logsum_WQ, work.decode_piece_W, name="latent_combine", grid={"slot": slots, "row": rows},
        threads=1, interpret=interpret, out_type=jax.ShapeDtypeStruct((slots, rows, width), part_WQH.dtype), scratch=(),
    )
