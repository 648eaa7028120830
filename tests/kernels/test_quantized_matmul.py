"""Packed products: what codes stand for, every implementation against the reference, batch invariance, refusals."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import contract
from kernels_pallas.contract import ContractError, NoImplementationError
from kernels_pallas.native import api as native
from kernels_pallas.quantized_matmul import PackedWeight, quantized_matmul
from kernels_pallas.quantized_matmul.weights import BLOCKS, dequantised, unpacked

KINDS = ("int4-zero", "int4-offset", "int8-zero", "int8-offset", "lut4-own", "lut4-shared", "fp8")
IN_XLA = (*KINDS, "fp4")          # what the other kernels refuse, too
SIZES = ((1, 16, 64, 32), (3, 50, 96, 32), (5, 100, 64, 64), (17, 72, 256, 128))     # T, O, I, group


def packed(kind: str, outs: int, ins: int, group: int, scale: str = "float16") -> tuple[PackedWeight, np.ndarray]:
    """A random packed weight, and the float32 matrix that it stands for, written out a number at a time."""
    rng = np.random.default_rng(0)
    code, _, extra = kind.partition("-")
    half = code in BLOCKS
    codes = rng.integers(0, 16 if half else 256, (outs, ins)).astype(np.uint8)
    if code == "fp4":
        group = 32 if group == 32 else 16
    if code == "fp8":
        codes[(codes & 127) == 127] = 1
    scale_OG = (rng.random((outs, ins // group)) * 0.1 + 0.01).astype("float32" if code in ("lut4", "fp8") else scale)
    if code == "fp4":
        scale_OG = (rng.integers(100, 130, (outs, ins // group)).astype(np.uint8)).view(ml_dtypes.float8_e8m0fnu)
    zero_OG = rng.integers(0, 17 if half else 256, scale_OG.shape).astype(np.uint8)
    offset_OG = rng.standard_normal(scale_OG.shape).astype(scale_OG.dtype)
    table_ET = rng.standard_normal((outs if extra == "own" else 1, 16)).astype(np.float32)
    expected = np.empty((outs, ins), np.float32)
    for o, i in np.ndindex(outs, ins):
        step, number = np.float32(scale_OG[o, i // group]), codes[o, i]
        if code == "fp8":
            expected[o, i] = step * np.float32(number.view(ml_dtypes.float8_e4m3fn))
        elif code == "fp4":
            expected[o, i] = step * np.float32(number.view(ml_dtypes.float4_e2m1fn))
        elif code == "lut4":
            expected[o, i] = step * table_ET[o if extra == "own" else 0, number]
        elif extra == "zero":
            expected[o, i] = step * (np.float32(number) - np.float32(zero_OG[o, i // group]))
        else:
            expected[o, i] = step * np.float32(number) + np.float32(offset_OG[o, i // group])
    kept = codes
    if half:
        kept = np.zeros((outs, ins // 2), np.uint8)
        for i in range(ins):
            (block, place), bytes_ = divmod(i, BLOCKS[code]), BLOCKS[code] // 2
            kept[:, bytes_ * block + place % bytes_] |= codes[:, i] << (4 * (place // bytes_))
    weight = PackedWeight(
        code=code, code_OC=jnp.asarray(kept), scale_OG=jnp.asarray(scale_OG),
        zero_OG=jnp.asarray(zero_OG) if extra == "zero" else None,
        offset_OG=jnp.asarray(offset_OG) if extra == "offset" else None,
        table_ET=jnp.asarray(table_ET) if code == "lut4" else None,
    )
    np.testing.assert_array_equal(unpacked(weight), codes)
    return weight, expected


def rows(tokens: int, ins: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((tokens, ins)), dtype)


@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("kind", IN_XLA)
def test_codes_stand_for_what_the_formulas_say(kind: str, scale: str) -> None:
    weight, expected = packed(kind, 7, 96, 32, scale)
    np.testing.assert_allclose(dequantised(weight), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", IN_XLA)
def test_the_product_equals_the_reference(kind: str, dtype: str) -> None:
    weight, _ = packed(kind, 40, 128, 64)
    x_TI = rows(6, 128, dtype)
    found = quantized_matmul(x_TI, weight, implementation="xla")
    assert found.dtype == jnp.float32
    expected = quantized_matmul(x_TI, weight, implementation="reference")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.fixture
def served() -> None:
    if native.refusals():
        pytest.skip("; ".join(native.refusals()))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_kernel_equals_the_reference(kind: str, scale: str) -> None:
    for tokens, outs, ins, group in SIZES:
        weight, expected = packed(kind, outs, ins, group, scale)
        x_TI = rows(tokens, ins)
        found = jax.jit(lambda x, w: quantized_matmul(x, w, implementation="native"))(x_TI, weight)
        nearest = expected.astype(ml_dtypes.bfloat16).astype(np.float64)
        exact = np.asarray(x_TI, np.float64) @ nearest.T
        magnitude = np.abs(np.asarray(x_TI, np.float64)) @ np.abs(nearest).T
        assert (np.abs(found - exact) <= 1e-6 * magnitude).all(), (tokens, outs, ins, group)


@pytest.mark.usefixtures("served")
def test_a_row_has_the_same_bits_in_a_batch_of_any_size() -> None:
    weight, _ = packed("int4-zero", 72, 256, 64)
    x_TI = rows(23, 256)
    multiply = jax.jit(lambda x, w: quantized_matmul(x, w, implementation="native"))
    alone = np.concatenate([multiply(x_TI[i : i + 1], weight) for i in range(23)])
    for count in (2, 3, 4, 7, 23):
        np.testing.assert_array_equal(multiply(x_TI[:count], weight), alone[:count])


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("tokens", "outs", "ins"), [(1, 16, 64), (3, 50, 100), (16, 96, 65), (33, 20, 7)])
def test_products_of_int8_are_exact(tokens: int, outs: int, ins: int) -> None:
    rng = np.random.default_rng(0)
    x_TI, weight_OI = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((tokens, ins), (outs, ins)))
    found = jax.jit(native.matmul_int8)(x_TI, weight_OI)
    np.testing.assert_array_equal(found, x_TI.astype(np.int32) @ weight_OI.astype(np.int32).T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_triton_kernel_equals_the_reference(kind: str) -> None:
    """Interpreted, on sizes that are no multiple of a block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from kernels_pallas.quantized_matmul import triton

        for tokens, outs, ins, group in ((3, 72, 96, 32), (18, 40, 256, 128)):
            weight, _ = packed(kind, outs, ins, group)
            x_TI = rows(tokens, ins)
            found = triton.quantized_matmul(x_TI, weight, is_interpreted=True)
            expected = quantized_matmul(x_TI, weight, implementation="reference")
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_refuses_what_breaks_the_contract() -> None:
    weight, _ = packed("int4-zero", 16, 64, 32)
    with pytest.raises(ContractError, match=r"x must be \[T, 64\]"):
        quantized_matmul(rows(2, 32), weight)
    with pytest.raises(ContractError, match="int4 needs zero or offset"):
        quantized_matmul(rows(2, 64), PackedWeight(code="int4", code_OC=weight.code_OC, scale_OG=weight.scale_OG))
    with pytest.raises(ContractError, match="scales must be float16 or float32, got bfloat16"):
        quantized_matmul(rows(2, 64), PackedWeight(
            code="int4", code_OC=weight.code_OC, scale_OG=weight.scale_OG.astype(jnp.bfloat16), zero_OG=weight.zero_OG
        ))
    with pytest.raises(NoImplementationError, match=r"triton: needs a GPU"):
        quantized_matmul(rows(2, 64), weight, implementation="triton")
    with pytest.raises(NoImplementationError, match=r"native: .*rows must be bfloat16"):
        quantized_matmul(rows(2, 64, "float32"), weight, implementation="native")


def test_codes_that_tritons_offsets_cannot_count_are_refused() -> None:
    def refused(outs: int, dtype: str) -> bool:
        return bool(contract.triton_size_refusals(jax.ShapeDtypeStruct((outs, 1 << 16), dtype)))

    sizes_GiB = {2: 1 << 15, 3: 3 << 14, 4: 1 << 16, 5: 5 << 14}
    assert [refused(outs, "uint8") for outs in sizes_GiB.values()] == [False, True, True, False]
    assert not any(refused(outs, "bfloat16") for outs in sizes_GiB.values())
