"""`words` in instructions of an NVIDIA GPU, inside a Mosaic kernel; and the same in jnp for the simulator.

A warpgroup holds 64 rows of codes: a thread 16 bytes of each of two rows. Knows register layouts; knows no tile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import OUTS
from kernels_pallas.quantized_matmul import words


def _layout(columns: int, together: int, lanes: tuple[Any, ...]) -> Any:
    """Of [64, columns]: a warp has 16 rows, a thread two of them, 8 apart, as wgmma has its A operand.

    Args:
      together: columns of one register.  lanes: of a row's eight, and of its parts.
    """
    tiles = ((64, columns), (16, columns), (8, columns), (1, together))
    whole = mgpu.TiledLayout(
        fragmented_array.Tiling(tiles), warp_dims=(-8,), lane_dims=lanes, vector_dim=-1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(whole.tiling, whole.warp_dims, whole.lane_dims, whole.vector_dim)


CODES = _layout(words.RUN_BYTES, 16, (-4, -3))
TABLES = _layout(8, 4, (-4, fragmented_array.Replicated(4)))


def by_group(groups: int) -> Any:
    """Layout of [64, groups]: a thread has the numbers of the groups whose codes it has."""
    parts = ((-3,) if groups > 1 else ()) + ((fragmented_array.Replicated(4 // groups),) if groups < 4 else ())
    return _layout(groups, 1, (-4, *parts))


def unpacked(kind: words.Kind, extra: str, code_OC: Array, beside: Array | None, scale: Array | None) -> Array:
    """Weights [64, run] of codes [64, RUN_BYTES], bfloat16 in wgmma's layout, columns as `words.arranged` has them.

    Args:
      beside: zeros uint8 or offsets [64, groups], or planes of tables int32 [64, 8], in this module's layouts.
      scale: float32 [64, groups]; None leaves weights unscaled.
    """
    given: dict[str, Array] = {"code": code_OC}
    layouts = {"code": CODES}
    if beside is not None:
        given["beside"] = beside.astype({"zero": jnp.int32, "offset": jnp.float32}.get(extra, jnp.int32))
        layouts["beside"] = by_group(beside.shape[1]) if extra in ("zero", "offset") else TABLES
    if scale is not None:
        given["scale"], layouts["scale"] = scale, by_group(scale.shape[1])
    shape = (OUTS, words.run_inputs(kind))

    @plgpu.inline_mgpu(
        arg_types=tuple(layouts.values()),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def unpack(_: Any, *arrays: Any) -> Any:
        return _fragment(kind, extra, shape, dict(zip(layouts, arrays, strict=True)))

    return unpack(*given.values())


def _fragment(kind: words.Kind, extra: str, shape: tuple[int, int], arrays: dict[str, Any]) -> Any:
    """The A operand, from registers of codes."""
    i32, do = ir.IntegerType.get_signless(32), _Instructions()
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    columns = registers.shape[1]       # of 8
    for half in range(2):              # rows of this thread
        [code] = [arrays["code"].registers.flat[half]]
        code_words = mgpu.utils.bitcast(code, ir.VectorType.get((words.WORDS,), i32))
        beside = arrays.get("beside")
        zero = offset = scale = None
        table: tuple[Any, ...] = ()
        if extra == "zero":
            zero = words.zero_pair(do, kind, _number(beside, half))
        elif extra == "offset":
            zero, offset = words.zero_pair(do, kind, mgpu.c(0, i32)), _number(beside, half)
        elif beside is not None:
            planes = [beside.registers.flat[2 * half + part] for part in range(2)]
            table = tuple(vector.extract(plane, [], [at]) for plane in planes for at in range(4))
        if "scale" in arrays:
            scale = _number(arrays["scale"], half)
        column = 0
        for at in range(words.WORDS):
            word = vector.extract(code_words, [], [at])
            for pair in words.pairs(do, kind, word, zero, table):
                value = pair if scale is None else do.scaled(pair, scale, offset)
                registers[0, column, 0, 0, half, 0, 0, 0, 0] = mgpu.utils.bitcast(
                    value, ir.VectorType.get((2,), ir.BF16Type.get())
                )
                column += 1
        assert column == columns
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _number(array: Any, half: int) -> Any:
    return vector.extract(array.registers.flat[half], [], [0])


class _Instructions:
    """`words.Words` as MLIR."""

    def __init__(self) -> None:
        self._i32, self._f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        self._pair = ir.VectorType.get((2,), ir.BF16Type.get())

    def _constant(self, bits: int) -> Any:
        return arith.constant(self._i32, ir.IntegerAttr.get(self._i32, bits - (bits >> 31 << 32)))

    def right(self, word: Any, bits: int) -> Any:
        return arith.shrui(word, self._constant(bits)) if bits else word

    def left(self, word: Any, bits: int) -> Any:
        return arith.shli(word, self._constant(bits))

    def keep(self, word: Any, mask: int) -> Any:
        return arith.andi(word, self._constant(mask))

    def keep_and_add(self, word: Any, mask: int, bits: int) -> Any:
        given = [word, self._constant(mask), self._constant(bits)]
        return llvm.inline_asm(self._i32, given, "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r")

    def add_bits(self, word: Any, bits: int) -> Any:
        return arith.ori(word, self._constant(bits))

    def flip(self, word: Any, bits: int) -> Any:
        return arith.xori(word, self._constant(bits))

    def join(self, one: Any, other: Any) -> Any:
        return arith.ori(one, other)

    def bytes_of(self, low: Any, high: Any, places: Any) -> Any:
        high, places = (self._constant(word) if isinstance(word, int) else word for word in (high, places))
        return llvm.inline_asm(self._i32, [low, high, places], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")

    def subtract(self, pair: Any, other: Any) -> Any:
        return self._on_pairs(arith.subf, pair, other)

    def multiply(self, pair: Any, factor: int) -> Any:
        return self._on_pairs(arith.mulf, pair, self._constant(factor))

    def scaled(self, pair: Any, scale: Any, offset: Any | None) -> Any:
        bits = self.left(pair, 16), self.keep(pair, 0xFFFF0000)
        low, high = (arith.mulf(arith.bitcast(self._f32, half), scale) for half in bits)
        if offset is not None:
            low, high = arith.addf(low, offset), arith.addf(high, offset)
        return llvm.inline_asm(self._i32, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")

    def _on_pairs(self, operation: Any, one: Any, other: Any) -> Any:
        pairs = (mgpu.utils.bitcast(word, self._pair) for word in (one, other))
        return mgpu.utils.bitcast(operation(*pairs), self._i32)


def simulated(kind: words.Kind, extra: str, code_OC: Array, beside: Array | None, scale: Array | None) -> Array:
    """The same in jnp, from what codes mean and not from their bits."""
    run, code_OI = words.run_inputs(kind), code_OC
    if words.PAIRS[kind] == 4:
        block = 8 if kind == "fp4" else 16
        bytes_ = code_OC.reshape(OUTS, -1, block)
        code_OI = jnp.stack([bytes_ & 15, bytes_ >> 4], axis=2).reshape(OUTS, run)

    def of_inputs(of_groups: Array) -> Array:
        return jnp.repeat(of_groups.astype(jnp.float32), run // of_groups.shape[1], axis=1)

    if kind == "fp8":
        value = jax.lax.bitcast_convert_type(code_OI, jnp.float8_e4m3fn).astype(jnp.float32)
    elif kind in ("int4", "int8"):
        value = code_OI.astype(jnp.float32) - (of_inputs(beside) if extra == "zero" else 0.0)
    else:
        assert beside is not None
        plane = jax.lax.bitcast_convert_type(beside, jnp.uint8).reshape(OUTS, 2, 16).astype(jnp.uint16)
        bits_OT = plane[:, 0] | plane[:, 1] << 8
        table_OT = jax.lax.bitcast_convert_type(bits_OT, jnp.bfloat16).astype(jnp.float32)
        value = jnp.take_along_axis(table_OT, code_OI.astype(jnp.int32), axis=1)
    if scale is not None:
        value = value * of_inputs(scale) + (of_inputs(beside) if extra == "offset" else 0.0)
    return words.arranged(value, kind).astype(jnp.bfloat16)
