"""`--quantization-backend`: refusals at start, and products of 8 bits on both sides beside the unpacked form."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.quantization import int8, packed
from jaxserve.quantization.packed import PackedTensor
from jaxserve.quantization.packing import multiplied_by
from kernels_pallas.eight_bit_matmul import eight_bit_matmul
from kernels_pallas.quantized_matmul import PackedWeight
from tests.device.fixture_models import FIXTURES
from tests.device.test_kv_codes import scored

LLAMA = FIXTURES / "tiny-llama3"


@pytest.mark.parametrize(("quantization", "backend", "reason"), [
    ("int8", "mosaic_gpu", "eight_bit_matmul: no implementation serves this request. mosaic_gpu: needs "),
    ("int8", "triton", "eight_bit_matmul: unknown implementation 'triton'"),
    ("fp8", "mosaic_gpu", "eight_bit_matmul: no implementation serves this request. mosaic_gpu: needs "),
    ("fp8", "triton", "quantized_matmul: .* triton: needs a GPU, the target is 'cpu'; rows must be bfloat16"),
    ("fp8", "native", "quantized_matmul: .* native: .*rows must be bfloat16"),
])
def test_what_cannot_serve_is_refused_at_start_by_its_own_reasons(quantization: str, backend: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization-backend {backend}: {reason}"):
        scored(LLAMA, quantization=quantization, quantization_backend=backend)


def test_a_backend_for_products_that_are_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization-backend xla: the model has no packed matrix .* leave it away"):
        scored(LLAMA, quantization_backend="xla")


@pytest.mark.parametrize(("activations", "groups"), [("token", 1), ("token", 2), ("static", 1), ("group", 2)])
def test_floats_of_8_bits_on_both_sides_are_the_unpacked_product(
    activations: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's place is taken by its specification."""
    rng = np.random.default_rng(0)
    bits_OI = rng.normal(size=(24, 256)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    tensor = PackedTensor(
        weight=PackedWeight(
            code="fp8", code_OC=jnp.asarray(bits_OI), scale_OG=jnp.asarray(rng.random((24, groups)), jnp.float32)
        ),
        input_scale=jnp.asarray([0.02], jnp.float32) if activations == "static" else None, activations=activations,
    )
    x_TI = jnp.asarray(rng.normal(size=(5, 256)), jnp.float32)
    expected = tensor.matmul(x_TI)
    asked: list[Any] = []

    def specification(*arrays: Any, implementation: str) -> Any:
        asked.append((implementation, arrays[0].dtype, arrays[1].dtype))
        return eight_bit_matmul(*arrays, implementation="reference")

    monkeypatch.setattr(packed, "eight_bit_matmul", specification)
    found = multiplied_by(tensor, "mosaic_gpu").matmul(x_TI)
    assert asked == [("mosaic_gpu", jnp.float8_e4m3fn, jnp.float8_e4m3fn)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * float(jnp.abs(expected).max()))


def test_integers_of_8_bits_are_exact_whoever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x_TI, weight_OI = (jnp.asarray(rng.integers(-128, 128, (size, 256)), jnp.int8) for size in (5, 24))
    expected = np.asarray(x_TI, np.int64) @ np.asarray(weight_OI, np.int64).T
    for implementation in ("xla", "reference"):
        np.testing.assert_array_equal(int8.int8_dot(x_TI, weight_OI, implementation), expected)
    monkeypatch.setattr(int8, "eight_bit_matmul", functools.partial(pytest.fail, "not asked for"))
    np.testing.assert_array_equal(int8.int8_dot(x_TI, weight_OI), expected)
