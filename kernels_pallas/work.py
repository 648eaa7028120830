"""Attention work of one step, planned on the host once and shared by all layers.

Knows which packed tokens belong to which row and how long each row is; knows no page, no head and no dtype.
A step has a decode section (one token a sequence, or as many as verify a draft; sorted by length into blocks, so that a
block's loop over the context wastes little) and a prefill section (tiles of consecutive query tokens of one sequence).
GPU kernels want other cuts of the same work: pieces of each decode entry's context, and spans, which are tiles of more
tokens.
Invariant: shapes depend on the token bucket T and the row count R only. How many blocks and tiles there are, and how
far each one reads, is data: the context length needs no bucket.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from numpy.typing import NDArray

DECODE_BLOCK = 8     # decode entries that share one loop over the context
TILE_TOKENS = 32     # query tokens of one prefill tile
SPAN_TOKENS = 128    # query tokens of one prefill span
PIECES_EXTRA = 64    # pieces beyond one a decode slot: times the kv heads, work for every multiprocessor of a large GPU
PIECE_SLOTS = 256    # pieces begin at multiples of this, and so of every kernel's block of slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWork:
    """Work items of one step, all int32.

    Attributes:
      decode_count: [] decode entries; theirs are the first packed tokens, in entry order.
      decode_token_W: first packed token of each decode slot, longest context first; 0 past decode_count.
      decode_row_W: its row; 0 past decode_count.
      decode_length_W: its context length, its tokens included; 0 past decode_count.
      decode_slot_W: the inverse of decode_token_W: where entry i went.
      tile_count: [] prefill tiles.
      tile_token_W: first packed token of each tile.  tile_row_W: its row.  tile_position_W: that token's position.
      tile_size_W: tokens of the tile, 1 .. TILE_TOKENS; 0 past tile_count.
      piece_count: [] pieces of the decode section's contexts.
      piece_slot_W: decode slot of each piece; 0 past piece_count.
      piece_begin_W, piece_end_W: the context slots it holds, never none; 0 past piece_count.
      decode_piece_W: first piece of each decode slot, and one more: slot w has the pieces [w] .. [w + 1].
      span_count, span_token_W, span_row_W, span_position_W, span_size_W: as of tiles, of SPAN_TOKENS tokens.
    """

    decode_count: jax.Array
    decode_token_W: jax.Array
    decode_row_W: jax.Array
    decode_length_W: jax.Array
    decode_slot_W: jax.Array
    tile_count: jax.Array
    tile_token_W: jax.Array
    tile_row_W: jax.Array
    tile_position_W: jax.Array
    tile_size_W: jax.Array
    piece_count: jax.Array
    piece_slot_W: jax.Array
    piece_begin_W: jax.Array
    piece_end_W: jax.Array
    decode_piece_W: jax.Array
    span_count: jax.Array
    span_token_W: jax.Array
    span_row_W: jax.Array
    span_position_W: jax.Array
    span_size_W: jax.Array

    @classmethod
    def from_arrays(cls, arrays: dict[str, jax.Array]) -> AttentionWork:
        """Names are those of `work_layout`."""
        return cls(**arrays)


def work_layout(token_count: int, row_count: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of the plan for a bucket of `token_count` tokens and `row_count` rows."""
    slots = _decode_slot_count(token_count, row_count)
    pieces = slots + PIECES_EXTRA
    layout: dict[str, tuple[int, ...]] = {
        "decode_count": (),
        "decode_token_W": (slots,),
        "decode_row_W": (slots,),
        "decode_length_W": (slots,),
        "decode_slot_W": (slots,),
        "piece_count": (),
        "piece_slot_W": (pieces,),
        "piece_begin_W": (pieces,),
        "piece_end_W": (pieces,),
        "decode_piece_W": (slots + 1,),
    }
    for kind, size in (("tile", TILE_TOKENS), ("span", SPAN_TOKENS)):
        # Each prefill entry ends in at most one tile that is not full.
        count = token_count // size + min(token_count, row_count)
        layout |= {f"{kind}_count": ()}
        layout |= {f"{kind}_{name}_W": (count,) for name in ("token", "row", "position", "size")}
    return layout


def decode_block_size(slot_count: int) -> int:
    """Decode slots that share a loop; `slot_count` is the length of the decode arrays."""
    return min(DECODE_BLOCK, slot_count)


def plan_work(
    *,
    row_A: NDArray[np.int32],
    start_A: NDArray[np.int32],
    count_A: NDArray[np.int32],
    decode_count: int,
    token_count_bucket: int,
    row_count: int,
    decode_tokens: int = 1,
) -> dict[str, NDArray[np.int32]]:
    """Plans a step, padded to `work_layout(token_count_bucket, row_count)`.

    Args:
      row_A: row of each entry; every row at most once.
      start_A: position of the entry's first token.  count_A: its tokens, packed in entry order.
      decode_count: entries before this index have `decode_tokens` each; those after it are tiled, whatever their count.
      decode_tokens: one, or one and the drafts after it: all of an entry are computed over one reading of its context.
    """
    layout = work_layout(token_count_bucket, row_count)
    work = {name: np.zeros(shape, np.int32) for name, shape in layout.items()}
    entry_count = row_A.shape[0]
    token_total = int(count_A.sum())
    if entry_count > row_count or token_total > token_count_bucket:
        raise ValueError(
            f"a step of {entry_count} entries and {token_total} tokens does not fit {row_count} rows and a bucket of "
            f"{token_count_bucket} tokens"
        )
    if not 0 <= decode_count <= entry_count or (count_A[:decode_count] != decode_tokens).any():
        raise ValueError(
            f"decode_count is {decode_count}: that many first entries must have decode_tokens={decode_tokens} each"
        )
    work["decode_count"][...] = decode_count
    if decode_count:
        length_A = start_A[:decode_count] + decode_tokens
        order = np.argsort(-length_A, kind="stable")
        work["decode_token_W"][:decode_count] = order * decode_tokens
        work["decode_row_W"][:decode_count] = row_A[order]
        work["decode_length_W"][:decode_count] = length_A[order]
        work["decode_slot_W"][order] = np.arange(decode_count, dtype=np.int32)
        _plan_pieces(work, length_A[order])
    if decode_count < entry_count:
        for kind, size in (("tile", TILE_TOKENS), ("span", SPAN_TOKENS)):
            _plan_tiles(work, kind, size, row_A, start_A, count_A, decode_count, decode_tokens)
    return work


def _plan_pieces(work: dict[str, NDArray[np.int32]], length_W: NDArray[np.int32]) -> None:
    """Cuts contexts into pieces of one size, the smallest that cannot give more pieces than there is room for."""
    count = length_W.shape[0]
    room = work["piece_slot_W"].shape[0] - count
    size = -(-int(length_W.sum()) // (room * PIECE_SLOTS)) * PIECE_SLOTS
    pieces_W = -(-length_W // size)
    first_W = np.cumsum(pieces_W) - pieces_W
    total = int(pieces_W.sum())
    slot_W = np.repeat(np.arange(count), pieces_W)
    begin_W = (np.arange(total) - first_W[slot_W]) * size
    work["piece_count"][...] = total
    work["piece_slot_W"][:total] = slot_W
    work["piece_begin_W"][:total] = begin_W
    work["piece_end_W"][:total] = np.minimum(begin_W + size, length_W[slot_W])
    work["decode_piece_W"][:count] = first_W
    work["decode_piece_W"][count:] = total


def _plan_tiles(
    work: dict[str, NDArray[np.int32]],
    kind: str,
    size: int,
    row_A: NDArray[np.int32],
    start_A: NDArray[np.int32],
    count_A: NDArray[np.int32],
    decode_count: int,
    decode_tokens: int,
) -> None:
    """Cuts entries from `decode_count` on into tiles of `size` consecutive tokens, in packed order."""
    count_A = count_A[decode_count:]
    tiles_A = -(-count_A // size)
    total = int(tiles_A.sum())
    entry_W = np.repeat(np.arange(count_A.shape[0]), tiles_A)
    first_tile_A = np.cumsum(tiles_A) - tiles_A
    offset_W = (np.arange(total) - first_tile_A[entry_W]) * size
    first_token_A = decode_count * decode_tokens + np.cumsum(count_A) - count_A
    work[f"{kind}_count"][...] = total
    work[f"{kind}_token_W"][:total] = first_token_A[entry_W] + offset_W
    work[f"{kind}_row_W"][:total] = row_A[decode_count:][entry_W]
    work[f"{kind}_position_W"][:total] = start_A[decode_count:][entry_W] + offset_W
    work[f"{kind}_size_W"][:total] = np.minimum(count_A[entry_W] - offset_W, size)


def _decode_slot_count(token_count: int, row_count: int) -> int:
    entries = min(token_count, row_count)
    return entries if entries <= DECODE_BLOCK else -(-entries // DECODE_BLOCK) * DECODE_BLOCK
