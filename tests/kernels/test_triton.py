"""The portable Triton kernels, their operations interpreted: right beside the reference, nothing unseen is read."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from kernels_pallas.kv_write import reference as write_reference
from tests.kernels.simulator import CASES, inputs
from tests.kernels.test_kv_write import bits, step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RIGHT = {
    name: case for name, case in CASES.items()
    if case.bug is None and (case.codes is None or case.codes == "int8") and (case.head_dim < 256 or case.latent_dim)
}
QUICK = ("window-sinks-soft-cap", "int8")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RIGHT])
@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill"])
def test_kernel_equals_the_reference(op: str, name: str) -> None:
    case = dataclasses.replace(RIGHT[name])
    kernel, reference = (importlib.import_module(f"kernels_pallas.{op}.{form}") for form in ("triton", "reference"))
    arrays, options = inputs(case)
    if op == "paged_decode":
        options["tokens"] = case.tokens
    expected = np.asarray(getattr(reference, op)(*arrays, **options), np.float32)
    interpreted = jax.jit(functools.partial(getattr(kernel, op), is_interpreted=True, **options))
    got = np.asarray(interpreted(*arrays), np.float32)
    assert np.isfinite(got).all(), "poison was read"
    assert np.abs(got - expected).max() <= 0.01 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writes_real_tokens_and_nothing_else(dtype: str) -> None:
    from kernels_pallas.kv_write.triton import kv_write

    arrays = step(dtype)
    np.testing.assert_array_equal(bits(kv_write(*arrays, is_interpreted=True)), bits(write_reference.kv_write(*arrays)))
