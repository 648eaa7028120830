"""How 32-bit words of codes become pairs of bfloat16 in the registers of a tensor-core product on NVIDIA GPUs.

A thread of a wgmma holds of each row of its A operand, every 16 inputs, two pairs: (2c, 2c + 1) and (8 + 2c, 9 + 2c),
c its place of four in the row. Which inputs those columns stand for is free as long as the other operand agrees. So a
thread takes 16 consecutive bytes of codes, words are split by masks alone, nothing crosses threads, and the rows of
the product are brought into the same order (`arranged`) once, outside.

    4 bits   a word: inputs j..j+3 in low halves, j+16..j+19 in high halves (fp4: j+8..) -> 4 pairs, 2 steps of 16
    8 bits   a word: inputs j..j+3 -> 2 pairs, one step

Integers are exact: 0x4300 | code is 128 + code as bfloat16, and 128 + zero is subtracted. Operations are those of
`Words`, which a kernel implements with instructions and a test with numpy. Knows no kernel."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import jax.numpy as jnp
from jax import Array

Word = Any
Kind = Literal["int4", "int8", "fp8", "table", "fp4"]

WORDS = 4                # of a thread and row at once: 16 bytes
RUN_BYTES = 64           # of a row: four threads
MAGIC = 0x4300           # 128 as bfloat16, whose last place is 1
FP8_FACTOR = 0x7B807B80  # 2^120 twice: what moves a 4-bit exponent to bfloat16's place
PAIRS = {"int4": 4, "table": 4, "fp4": 4, "int8": 2, "fp8": 2}

# The inputs of a run, as an array of these axes, and the order of axes that makes them columns of the product.
ORDERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "int4": ((4, 2, 4, 2, 2), (2, 4, 1, 0, 3)),         # place, half, word, byte of a pair, pair
    "table": ((4, 2, 4, 2, 2), (2, 3, 1, 0, 4)),        # place, half, word, pair, byte of a pair
    "fp4": ((4, 2, 2, 2, 2, 2), (1, 3, 4, 2, 0, 5)),    # place, block, half, word of a block, pair, byte of a pair
    "int8": ((4, 4, 2, 2), (1, 2, 0, 3)),               # place, word, pair, byte of a pair
    "fp8": ((4, 4, 2, 2), (1, 2, 0, 3)),
}


class Words(Protocol):
    """What can be done to words of a thread. Numbers are constants; floats are float32 values."""

    def right(self, word: Word, bits: int) -> Word: ...
    def left(self, word: Word, bits: int) -> Word: ...
    def keep(self, word: Word, mask: int) -> Word: ...
    def keep_and_add(self, word: Word, mask: int, bits: int) -> Word: ...
    def add_bits(self, word: Word, bits: int) -> Word: ...
    def flip(self, word: Word, bits: int) -> Word: ...
    def join(self, one: Word, other: Word) -> Word: ...
    def bytes_of(self, low: Word, high: Word, places: Word | int) -> Word: ...
    def subtract(self, pair: Word, other: Word) -> Word: ...
    def multiply(self, pair: Word, factor: int) -> Word: ...
    def scaled(self, pair: Word, scale: Any, offset: Any | None) -> Word: ...


def run_inputs(kind: Kind) -> int:
    """Inputs of RUN_BYTES bytes."""
    return RUN_BYTES * (2 if PAIRS[kind] == 4 else 1)


def arranged(x: Array, kind: Kind) -> Array:
    """Inputs along the last axis, a multiple of a run, in the order of the product's columns."""
    axes, order = ORDERS[kind]
    runs = x.reshape(-1, *axes).transpose(0, *(1 + axis for axis in order))
    return runs.reshape(x.shape)


def pairs(words: Words, kind: Kind, word: Word, zero: Word | None, table: tuple[Word, ...]) -> list[Word]:
    """What the codes of a word stand for, less the zero, as pairs of bfloat16: one for every 8 columns.

    Args:
      zero: `zero_pair` of int4 and int8.  table: `table_planes` of a row, of "table" and "fp4".
    """
    if kind == "int4":
        return [
            words.subtract(words.keep_and_add(words.right(word, 4 * at), 0x000F000F, MAGIC << 16 | MAGIC), zero)
            for at in range(4)
        ]
    if kind == "int8":
        return [words.subtract(_less_128(words, word, places), zero) for places in (0x4140, 0x4342)]
    if kind == "fp8":
        return [_float8(words, word, places) for places in (0x1404, 0x3424)]
    return _looked_up(words, word, table)


def zero_pair(words: Words, kind: Kind, zero: Word) -> Word:
    """What `pairs` subtracts for a zero that is an integer in a word: 128 + zero, or zero - 128, twice."""
    if kind == "int4":
        return words.add_bits(words.join(zero, words.left(zero, 16)), MAGIC << 16 | MAGIC)
    return _less_128(words, words.join(zero, words.left(zero, 8)), 0x4140)


def _less_128(words: Words, word: Word, places: int) -> Word:
    """Two bytes, less 128 each. The highest bit of a byte lands in the exponent, where it doubles: taken off apart."""
    spread = words.bytes_of(word, 0x43, places)
    low = words.keep(spread, 0xFF7FFF7F)
    high = words.flip(words.keep(spread, 0xFF80FF80), 0x00800080)
    return words.subtract(low, high)


def _float8(words: Words, word: Word, places: int) -> Word:
    """Two e4m3 floats; subnormal ones come out right, NaN as 480."""
    spread = words.bytes_of(word, 0, places)
    size = words.right(words.keep(spread, 0x7F007F00), 4)
    return words.multiply(words.join(words.keep(spread, 0x80008000), size), FP8_FACTOR)


def _looked_up(words: Words, word: Word, table: tuple[Word, ...]) -> list[Word]:
    """Four codes at a time: the low and the high bytes of their values, each from one of two pairs of registers."""
    found = []
    index = words.keep(word, 0x77777777)
    upper = words.add_bits(words.right(words.keep(word, 0x88888888), 1), 0x32103210)
    for bits in (0, 16):
        four, half = words.right(index, bits), words.right(upper, bits)
        planes = []
        for plane in (0, 4):
            below = words.bytes_of(table[plane], table[plane + 1], four)
            above = words.bytes_of(table[plane + 2], table[plane + 3], four)
            planes.append(words.bytes_of(below, above, half))
        found += [words.bytes_of(*planes, 0x6240), words.bytes_of(*planes, 0x7351)]
    return found


def table_planes(table_ET: Array) -> Array:
    """Tables [E, 16] of bfloat16 values as words [E, 8]: the low bytes of all values, then the high bytes."""
    bits_ET = jnp.asarray(table_ET.astype(jnp.bfloat16)).view(jnp.uint16).astype(jnp.uint32)
    planes = [(bits_ET & 255).reshape(-1, 4, 4), (bits_ET >> 8).reshape(-1, 4, 4)]
    shift = jnp.arange(0, 32, 8, dtype=jnp.uint32)
    return jnp.concatenate([(plane << shift).sum(-1, dtype=jnp.uint32) for plane in planes], axis=1).view(jnp.int32)
