"""Codes in registers: threads' words, computed with numpy as the GPU kernel does with instructions, give the A operand.

Which register of which thread holds what is read off jax's layouts, written out anew here.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import sizes, words
from tests.kernels.test_quantized_matmul import packed

CASES = [      # kind, inputs of a group, whether weights are scaled in registers
    ("int4-zero", 128, False), ("int4-zero", 64, True), ("int4-offset", 32, True), ("int8-zero", 64, False),
    ("int8-zero", 16, True), ("int8-offset", 32, True), ("lut4-own", 128, False), ("lut4-shared", 64, True),
    ("fp8", 64, False), ("fp8", 64, True), ("fp4", 32, True),
]
WARPS = (0, 3)

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"the kernel's layouts need jax >= 0.11, not {jax.__version__}"
)


class _Numpy:
    """`words.Words` on numpy's uint32: what PTX says of each instruction."""

    def right(self, word: Any, bits: int) -> Any:
        return word >> np.uint32(bits)

    def left(self, word: Any, bits: int) -> Any:
        return word << np.uint32(bits)

    def keep(self, word: Any, mask: int) -> Any:
        return word & np.uint32(mask)

    def keep_and_add(self, word: Any, mask: int, bits: int) -> Any:
        return word & np.uint32(mask) | np.uint32(bits)

    def add_bits(self, word: Any, bits: int) -> Any:
        return word | np.uint32(bits)

    def flip(self, word: Any, bits: int) -> Any:
        return word ^ np.uint32(bits)

    def join(self, one: Any, other: Any) -> Any:
        return one | other

    def bytes_of(self, low: Any, high: Any, places: Any) -> Any:
        """prmt: four bits a byte of the result; the highest repeats a sign, which nobody here asks for."""
        given = (np.uint64(high) << np.uint64(32)) | np.uint64(low)
        found = np.uint32(0)
        for byte in range(4):
            place = (np.uint64(places) >> np.uint64(4 * byte)) & np.uint64(15)
            assert place < 8
            found |= np.uint32((given >> (place * np.uint64(8))) & np.uint64(255)) << np.uint32(8 * byte)
        return found

    def subtract(self, pair: Any, other: Any) -> Any:
        return self._on_pairs(np.subtract, pair, other)

    def multiply(self, pair: Any, factor: int) -> Any:
        return self._on_pairs(np.multiply, pair, np.uint32(factor))

    def scaled(self, pair: Any, scale: Any, offset: Any | None) -> Any:
        value = _values(pair).astype(np.float32) * np.float32(scale)
        value = value if offset is None else value + np.float32(offset)
        return value.astype(ml_dtypes.bfloat16).view(np.uint32)[0]

    def _on_pairs(self, operation: Any, one: Any, other: Any) -> Any:
        exact = operation(_values(one).astype(np.float32), _values(other).astype(np.float32))
        return exact.astype(ml_dtypes.bfloat16).view(np.uint32)[0]


def _values(pair: Any) -> Any:
    return np.array([pair], np.uint32).view(ml_dtypes.bfloat16)


def held(layout: Any, shape: tuple[int, int]) -> np.ndarray:
    """Element numbers [warp, lane, register, of a register] of an array in a layout."""
    layout = layout.to_mgpu()
    tiled = np.arange(shape[0] * shape[1]).reshape(shape)
    for tile in layout.tiling.tiles:
        kept, cut = tiled.shape[: tiled.ndim - len(tile)], tiled.shape[tiled.ndim - len(tile) :]
        parts = ((size // part, part) for size, part in zip(cut, tile, strict=True))
        split = tiled.reshape(*kept, *itertools.chain(*parts))
        first = len(kept)
        outer, inner = range(first, split.ndim, 2), range(first + 1, split.ndim, 2)
        tiled = split.transpose(*range(first), *outer, *inner)

    def sizes_of(dims: Any) -> list[tuple[int | None, int]]:
        return [(None, d.times) if hasattr(d, "times") else (d, tiled.shape[d]) for d in dims]

    found = np.empty((4, 32), object)
    for name, dims in (("warp", sizes_of(layout.warp_dims)), ("lane", sizes_of(layout.lane_dims))):
        assert np.prod([size for _, size in dims]) == {"warp": 4, "lane": 32}[name]
    every = [*sizes_of(layout.warp_dims), *sizes_of(layout.lane_dims)]
    lanes = len(layout.lane_dims)
    for place in itertools.product(*(range(size) for _, size in every)):
        index: list[Any] = [slice(None)] * tiled.ndim
        for (dim, _), at in zip(every, place, strict=True):
            if dim is not None:
                index[dim] = slice(at, at + 1)
        warp, lane = (
            np.ravel_multi_index(part, [size for _, size in dims])
            for part, dims in ((place[:-lanes], every[:-lanes]), (place[-lanes:], every[-lanes:]))
        )
        found[warp, lane] = tiled[tuple(index)].reshape(-1, tiled.shape[-1])
    return np.array(found.tolist())


@pytest.mark.parametrize(("kind", "group", "is_scaled"), CASES)
def test_registers_hold_the_weights_in_the_order_of_the_rows(kind: str, group: int, is_scaled: bool) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.quantized_matmul import instructions

    code, _, extra = kind.partition("-")
    read = "table" if code == "lut4" else code
    run = words.run_inputs(read)
    weight, value_OI = packed(kind, 64, run, min(group, run))
    scale_OG, beside = np.asarray(sizes.scales(weight), np.float32), np.asarray(sizes.beside(weight))
    if not is_scaled:
        per_input = np.repeat(scale_OG, run // scale_OG.shape[1], axis=1)
        value_OI = np.divide(value_OI, per_input)
    codes = np.asarray(weight.code_OC).reshape(-1)
    of_groups = held(instructions.by_group(scale_OG.shape[1]), scale_OG.shape)
    of_codes, of_tables = held(instructions.CODES, (64, words.RUN_BYTES)), held(instructions.TABLES, (64, 8))
    of_operand = held(plgpu.Layout.WGMMA, (64, run))
    operand, do = np.empty(64 * run, ml_dtypes.bfloat16), _Numpy()
    for warp, lane, half in itertools.product(WARPS, range(32), range(2)):
        row_words = codes[of_codes[warp, lane, half]].view(np.uint32)
        number = of_groups[warp, lane, half, 0]
        zero = offset = None
        table: tuple[Any, ...] = ()
        if extra == "zero":
            zero = words.zero_pair(do, read, np.uint32(beside.reshape(-1)[number]))
        elif extra == "offset":
            zero, offset = words.zero_pair(do, read, np.uint32(0)), beside.reshape(-1)[number]
        elif read in ("table", "fp4"):
            of_row = of_tables[warp, lane, 2 * half : 2 * half + 2].reshape(-1)
            table = tuple(beside.reshape(-1).view(np.uint32)[of_row])
        pairs = [pair for word in row_words for pair in words.pairs(do, read, word, zero, table)]
        for column, pair in enumerate(pairs):
            pair = do.scaled(pair, scale_OG.reshape(-1)[number], offset) if is_scaled else pair
            operand[of_operand[warp, lane, 2 * column + half]] = _values(pair)
    arranged_OI = np.asarray(words.arranged(jnp.asarray(value_OI), read)).astype(ml_dtypes.bfloat16)
    found, expected = (of.reshape(4, 16 * run)[list(WARPS)] for of in (operand, arranged_OI))
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2**-7, atol=1e-6)
    # A table's values are rounded before they are scaled, and once more after.
    assert np.mean(found == expected) > (0.6 if code == "lut4" and is_scaled else 0.99)


def test_rows_are_arranged_by_moving_them_only() -> None:
    for kind in words.ORDERS:
        run = words.run_inputs(kind)
        moved = np.asarray(words.arranged(jnp.arange(3 * run).reshape(1, -1), kind))[0]
        for at in range(3):
            assert sorted(moved[at * run : (at + 1) * run]) == list(range(at * run, (at + 1) * run))
