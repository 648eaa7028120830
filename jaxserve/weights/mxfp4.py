"""MXFP4 tensors shown as the floats they stand for: blocks of 32 four-bit values that share a power-of-two scale.

Source: OCP Microscaling Formats 1.0 (E2M1 elements, E8M0 scales). gpt-oss stores `NAME_blocks` [E, O, I / 32, 16] and
`NAME_scales` [E, O, I / 32], both uint8; a byte holds two neighbours, the lower four bits first. The scale's exponent
is stored with a bias of 127. What is shown is [E, I, O], as the same weights lie in a checkpoint of bfloat16.
Knows no model and no parameter. Invariant: a tensor is decoded an expert at a time, when it is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.weights.files import StoredTensor

BLOCK = 32
SCALE_BIAS = 127
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Mxfp4Array:
    """Looks like an array [E, I, O] of bfloat16 of which whole experts can be taken."""

    dtype = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, blocks: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> None:
        self._blocks, self._scales = blocks, scales
        experts, rows, count, _ = blocks.shape
        self.shape = (experts, count * BLOCK, rows)
        self.ndim = 3

    def __getitem__(self, expert: int) -> np.ndarray[Any, Any]:
        """One expert's matrix [I, O], decoded. Scales outside bfloat16's range become 0 or infinity."""
        packed = self._blocks[expert]
        rows, count, _ = packed.shape
        values = np.empty((rows, count, BLOCK), np.float32)
        values[..., 0::2], values[..., 1::2] = VALUES[packed & 15], VALUES[packed >> 4]
        exponent = self._scales[expert].astype(np.int32) - SCALE_BIAS
        with np.errstate(over="ignore", under="ignore"):
            values = np.ldexp(values, exponent[..., None])
        return values.reshape(rows, count * BLOCK).T.astype(self.dtype)


def with_decoded(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with every pair of blocks and scales replaced by what it stands for."""
    found = dict(stored)
    for name, blocks in stored.items():
        base = name.removesuffix("_blocks")
        scales = stored.get(f"{base}_scales")
        if base == name or scales is None:
            continue
        if blocks.data.dtype != np.uint8 or scales.data.dtype != np.uint8:
            raise WeightsError(f"tensors {name!r} and {scales.name!r} must be uint8 to be MXFP4")
        if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK // 2 or scales.shape != blocks.shape[:-1]:
            raise WeightsError(
                f"tensor {name!r} is {list(blocks.shape)} and its scales are {list(scales.shape)}; MXFP4 needs "
                "[experts, rows, blocks, 16] and [experts, rows, blocks]"
            )
        del found[name], found[scales.name]
        shown: Any = Mxfp4Array(blocks.data, scales.data)
        found[base] = StoredTensor(name=base, file=blocks.file, data=shown)
    return found
