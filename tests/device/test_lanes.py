"""Products of one or two rows: right for every width, as good as dots, and nowhere a dot of one bfloat16 row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.linear import matmul
from kernels_pallas.lanes import ROWS_MAX, TERMS_MAX, lane_matmul
from kernels_pallas.native import api as native

WIDTHS = (1, 15, 16, 24, 576, 16 * TERMS_MAX, 16 * 53, 1536, 11008)     # 53 is a prime: chunks of one term


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", range(1, ROWS_MAX + 1))
@pytest.mark.parametrize("width", WIDTHS)
def test_lanes_are_as_exact_as_float32_sums(width, rows, dtype):
    random = np.random.default_rng(width)
    x, weight = (jnp.asarray(random.standard_normal(shape), dtype) for shape in ((rows, width), (7, width)))
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T
    got = jax.jit(lane_matmul)(x, weight)
    assert got.dtype == jnp.float32 and got.shape == (rows, 7)
    assert (np.abs(got - exact) <= 1e-6 * magnitude).all()


@pytest.mark.parametrize(("rows", "dtype", "is_dot"), [
    (1, "bfloat16", False), (2, "bfloat16", False), (3, "bfloat16", True), (1, "float32", True),
])
def test_few_rows_of_short_types_are_no_dots(rows, dtype, is_dot, monkeypatch):
    monkeypatch.setattr(native, "serves_dot", lambda dtype, width_out: False)
    x, weight = jnp.zeros((rows, 64), dtype), jnp.zeros((32, 64), dtype)
    lowered = jax.jit(partial(matmul)).lower(x, weight).as_text()
    assert (f"tensor<32x64x{'bf16' if dtype == 'bfloat16' else 'f32'}>" in lowered)
    dots = [line for line in lowered.splitlines() if "dot_general" in line and ("bf16" in line or "32x64xf32" in line)]
    assert bool(dots) == is_dot


@pytest.mark.parametrize(("dtype", "outs", "is_native"), [
    ("bfloat16", 32, True), ("bfloat16", 8, False), ("float32", 32, False),
])
def test_bfloat16_goes_to_the_native_kernel_at_any_number_of_rows(dtype, outs, is_native):
    if native.refusals():
        pytest.skip("; ".join(native.refusals()))
    for rows in (1, 3, 64):
        x, weight = jnp.zeros((rows, 64), dtype), jnp.zeros((outs, 64), dtype)
        lowered = jax.jit(partial(matmul)).lower(x, weight).as_text()
        assert ("@jaxserve_dot" in lowered) == is_native
