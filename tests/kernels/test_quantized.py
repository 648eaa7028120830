"""Keys and values in eight bits: how they are written, what attention makes of them, what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.contract import ContractError, NoImplementationError
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.quantized import CODES, FP8, FP8_BITS, QuantizedPages, dequantize, quantize
from kernels_pallas.shapes import head_shape
from tests.kernels.test_attention_ops import OPS, Step, shrunk

P, K, S, H, R, M, T = 24, 2, 16, 8, 3, 4, 20
SCALES = ("float32", "bfloat16")


def in_codes(pages_PKSH: jax.Array, codes: str, scales: str = "float32") -> QuantizedPages:
    code, scale = quantize(pages_PKSH.reshape(-1, *pages_PKSH.shape[2:]), codes, scales)
    return QuantizedPages(code.reshape(pages_PKSH.shape), scale.reshape(pages_PKSH.shape[:3]))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("scales", SCALES)
@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_a_number_is_off_by_half_a_step_at_most(codes, scales, exponent, seed):
    rng = np.random.default_rng(seed)
    x_TKH = np.ldexp(rng.standard_t(2, (T, K, H)), exponent).astype(np.float32)
    code, scale = quantize(jnp.asarray(x_TKH), codes, scales)
    got = np.asarray(dequantize(QuantizedPages(code, scale)))
    largest = np.abs(x_TKH).max(-1, keepdims=True)
    rounded = 2.0**-8 if scales == "bfloat16" else 0.0      # a scale rounded down cuts the largest number off
    step = largest / 127 / 2 if codes == "int8" else np.maximum(np.abs(x_TKH) * 2.0**-4, largest / 448 * 2.0**-10)
    assert (np.abs(got - x_TKH) <= step * (1 + 2.0**-7) + largest * rounded).all()


@pytest.mark.parametrize("codes", CODES)
def test_zero_stays_zero_and_what_is_not_finite_is_noticed(codes):
    x_TKH = jnp.zeros((3, 1, H)).at[1, 0, 2].set(jnp.nan).at[2, 0, 3].set(jnp.inf)
    code, scale = quantize(x_TKH, codes, "float32")
    back = np.asarray(dequantize(QuantizedPages(code, scale)))
    assert (back[0] == 0).all() and scale[0, 0] == 0
    assert not np.isfinite(back[1:]).all(-1).any()


def step(codes: str, scales: str, heads: tuple[int, int] = (K, H)):
    rng = np.random.default_rng(0)
    page_RM = jnp.asarray(rng.permutation(P)[: R * M].reshape(R, M), jnp.int32)
    row_T, position_T = np.full(T, R, np.int32), np.zeros(T, np.int32)
    row_T[:12], position_T[:12] = 1, np.arange(10, 22)
    pool = in_codes(jnp.asarray(rng.normal(size=(P, heads[0], S, heads[1])), jnp.float32), codes, scales)
    x_TKH = jnp.asarray(rng.normal(size=(T, *heads)), jnp.bfloat16)
    return pool, x_TKH, page_RM, jnp.asarray(row_T), jnp.asarray(position_T)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("scales", "heads"), [
    *((scales, (K, H)) for scales in SCALES), pytest.param("float32", (1, 576), id="latents", marks=pytest.mark.slow),
])
def test_writes_codes_and_scales_of_real_tokens_and_nothing_else(codes, scales, heads):
    pool, *arrays = step(codes, scales, heads)
    written = kv_write(pool, *arrays, implementation="xla")
    expected = kv_write(pool, *arrays, implementation="reference")
    assert isinstance(written, QuantizedPages) and written.scale_PKS.dtype == scales
    for got, wanted in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(wanted, np.float32))
    changed = np.asarray(dequantize(written) != dequantize(pool)).any((1, 3)).sum()
    assert changed == 12
    token = np.asarray(dequantize(written))[arrays[1][1, 1], :, 0]      # position 16
    np.testing.assert_allclose(token, np.asarray(arrays[0][6], np.float32), atol=0.13, rtol=0.07)


@pytest.mark.parametrize("codes", ["int8", FP8_BITS])
def test_a_donated_pool_of_codes_is_written_in_place(codes):
    abstract = jax.ShapeDtypeStruct
    pool = QuantizedPages(abstract((1024, K, S, 64), codes), abstract((1024, K, S), jnp.float32))
    small = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((R, M), (T,), (T,))]
    write = jax.jit(functools.partial(kv_write, implementation="xla"), donate_argnums=0)
    memory = write.lower(pool, jax.ShapeDtypeStruct((T, K, 64), jnp.bfloat16), *small).compile().memory_analysis()
    size = 1024 * K * S * (64 + 4)
    assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < size // 50


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("codes", ["int8", FP8])
@pytest.mark.parametrize(
    "name",
    [
        "gpt-oss-20b-local", "deepseek-v2-lite",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("smollm2-135m", "gemma-2-9b-local")),
    ],
)
def test_attention_over_codes_equals_the_reference_and_reads_no_poison(op, codes, name):
    given = Step(shrunk(head_shape(name)), jnp.float32)
    k, v = (None if x is None else in_codes(x, codes) for x in (given.k_PKSH, given.v_PKSH))
    expected = given.run(op, "reference", k=k, v=v)
    got = given.run(op, "xla", k=k, v=v)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)
    exact = given.run(op, "reference")
    off = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-4 < off < (0.02 if codes == "int8" else 0.06)     # something was rounded, and no more than a step
    k, v = (None if x is None else poisoned(x, jnp.asarray(~given.held_PS)[:, None, :]) for x in (k, v))
    np.testing.assert_array_equal(given.run(op, "xla", k=k, v=v), got)


def poisoned(pages: QuantizedPages, free_PKS: jax.Array) -> QuantizedPages:
    code_PKSH, scale_PKS = pages.code_PKSH, jnp.where(free_PKS, jnp.nan, pages.scale_PKS)
    if code_PKSH.dtype == FP8:
        code_PKSH = jnp.where(free_PKS[..., None], jnp.nan, code_PKSH).astype(FP8)
    return QuantizedPages(code_PKSH, scale_PKS)


@pytest.mark.parametrize("op", OPS)
def test_bits_of_codes_are_the_codes(op):
    given = Step(shrunk(head_shape("smollm2-135m")), jnp.float32)
    k, v = in_codes(given.k_PKSH, FP8), in_codes(given.v_PKSH, FP8)
    bits = [x._replace(code_PKSH=jax.lax.bitcast_convert_type(x.code_PKSH, FP8_BITS)) for x in (k, v)]
    np.testing.assert_array_equal(given.run(op, "xla", k=bits[0], v=bits[1]), given.run(op, "xla", k=k, v=v))


def test_violations_and_refusals_say_what_and_why():
    given = Step(shrunk(head_shape("smollm2-135m")), jnp.float32)
    k = in_codes(given.k_PKSH, "int8")
    narrow = QuantizedPages(k.code_PKSH.astype(jnp.int16), k.scale_PKS[:, :1].astype(jnp.float16))
    call = functools.partial(paged_decode, page_RM=given.page_RM, work=given.work, scale=1.0)
    found = (
        r"codes must be one of int8, float8_e4m3fn, uint8, got int16; scales must be float32 or bfloat16, got float16; "
        r"scales must be one a slot and head, \(320, 2, 16\)"
    )
    with pytest.raises(ContractError, match=found):
        call(given.q_TNH, narrow, narrow)
    with pytest.raises(ContractError, match=r"k and v pages must be alike, got int8.* beside float32.* and float32"):
        call(given.q_TNH, k, given.v_PKSH)
    with pytest.raises(NoImplementationError, match="eight bits need scales: QuantizedPages"):
        paged_prefill(given.q_TNH, k.code_PKSH, k.code_PKSH, given.page_RM, given.work, scale=1.0)
    pool, *arrays = step("int8", "float32")
    with pytest.raises(ContractError, match="codes must be"):
        kv_write(pool._replace(code_PKSH=pool.code_PKSH.astype(jnp.int16)), *arrays)
