"""Attention work of one step, planned on the host once and shared by all layers.

Knows which packed tokens belong to which row and how long each row is; knows no page, no head and no dtype.
A step has a decode section (one token a sequence, sorted by length into blocks, so that a block's loop over the
context wastes little) and a prefill section (tiles of consecutive query tokens of one sequence).
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWork:
    """Work items of one step, all int32.

    Attributes:
      decode_count: [] entries with one token; they are the first packed tokens, in entry order.
      decode_token_W: packed token of each decode slot, longest context first; 0 past decode_count.
      decode_row_W: its row; 0 past decode_count.
      decode_length_W: its context length, the token itself included; 0 past decode_count.
      decode_slot_W: the inverse of decode_token_W: where entry i went.
      tile_count: [] prefill tiles.
      tile_token_W: first packed token of each tile.  tile_row_W: its row.  tile_position_W: that token's position.
      tile_size_W: tokens of the tile, 1 .. TILE_TOKENS; 0 past tile_count.
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

    @classmethod
    def from_arrays(cls, arrays: dict[str, jax.Array]) -> AttentionWork:
        """Names are those of `work_layout`."""
        return cls(**arrays)


def work_layout(token_count: int, row_count: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of the plan for a bucket of `token_count` tokens and `row_count` rows."""
    slots = _decode_slot_count(token_count, row_count)
    # Each prefill entry ends in at most one tile that is not full.
    tiles = token_count // TILE_TOKENS + min(token_count, row_count)
    return {
        "decode_count": (),
        "decode_token_W": (slots,),
        "decode_row_W": (slots,),
        "decode_length_W": (slots,),
        "decode_slot_W": (slots,),
        "tile_count": (),
        "tile_token_W": (tiles,),
        "tile_row_W": (tiles,),
        "tile_position_W": (tiles,),
        "tile_size_W": (tiles,),
    }


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
) -> dict[str, NDArray[np.int32]]:
    """Plans a step, padded to `work_layout(token_count_bucket, row_count)`.

    Args:
      row_A: row of each entry; every row at most once.
      start_A: position of the entry's first token.  count_A: its tokens, packed in entry order.
      decode_count: entries before this index have one token each; those after it are tiled, whatever their count.
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
    if not 0 <= decode_count <= entry_count or (count_A[:decode_count] != 1).any():
        raise ValueError(f"decode_count is {decode_count}: that many first entries must have one token each")
    work["decode_count"][...] = decode_count
    if decode_count:
        length_A = start_A[:decode_count] + 1
        order = np.argsort(-length_A, kind="stable")
        work["decode_token_W"][:decode_count] = order
        work["decode_row_W"][:decode_count] = row_A[order]
        work["decode_length_W"][:decode_count] = length_A[order]
        work["decode_slot_W"][order] = np.arange(decode_count, dtype=np.int32)
    if decode_count < entry_count:
        _plan_tiles(work, row_A, start_A, count_A, decode_count)
    return work


def _plan_tiles(
    work: dict[str, NDArray[np.int32]],
    row_A: NDArray[np.int32],
    start_A: NDArray[np.int32],
    count_A: NDArray[np.int32],
    decode_count: int,
) -> None:
    """Cuts entries from `decode_count` on into tiles of consecutive tokens, in packed order."""
    count_A = count_A[decode_count:]
    tiles_A = -(-count_A // TILE_TOKENS)
    total = int(tiles_A.sum())
    entry_W = np.repeat(np.arange(count_A.shape[0]), tiles_A)
    first_tile_A = np.cumsum(tiles_A) - tiles_A
    offset_W = (np.arange(total) - first_tile_A[entry_W]) * TILE_TOKENS
    first_token_A = decode_count + np.cumsum(count_A) - count_A
    work["tile_count"][...] = total
    work["tile_token_W"][:total] = first_token_A[entry_W] + offset_W
    work["tile_row_W"][:total] = row_A[decode_count:][entry_W]
    work["tile_position_W"][:total] = start_A[decode_count:][entry_W] + offset_W
    work["tile_size_W"][:total] = np.minimum(count_A[entry_W] - offset_W, TILE_TOKENS)


def _decode_slot_count(token_count: int, row_count: int) -> int:
    entries = min(token_count, row_count)
    return entries if entries <= DECODE_BLOCK else -(-entries // DECODE_BLOCK) * DECODE_BLOCK
