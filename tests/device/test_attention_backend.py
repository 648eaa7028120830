"""`--attention-backend`: Triton's kernels through the engine, interpreted, give XLA's tokens; refusals at start.

On several devices: test_tensor_parallel.py.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.layers import paged
from jaxserve.layers.context import LayerKv, StepContext
from jaxserve.models.decoder import Decoder, abstract_params
from jaxserve.models.registry import spec_from_config
from kernels_pallas import contract
from kernels_pallas.quantized import FP8, FP8_BITS, QuantizedPages
from kernels_pallas.work import AttentionWork, work_layout
from scripts.published_models import LATENT
from tests.device.fixture_models import FIXTURES
from tests.device.interpreted_kernels import OPS, interpret
from tests.device.test_kv_codes import scored

LLAMA = FIXTURES / "tiny-llama3"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel is traced."""
    return interpret(monkeypatch.setattr)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_triton_through_the_engine_gives_the_tokens_of_xla(interpreted: dict[str, int], tmp_path: Path) -> None:
    """One cache folder for both: an implementation is part of a program's key."""
    options = {"compilation_cache_dir": str(tmp_path / "programs")}
    expected, tokens, _ = scored(LLAMA, attention_backend="xla", **options)
    assert not interpreted
    got, same_tokens, _ = scored(LLAMA, attention_backend="triton", **options)
    assert interpreted.keys() == set(OPS)
    assert same_tokens == tokens
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(("backend", "reason"), [
    ("triton", "triton: needs a GPU, the target is 'cpu'; .*values must be bfloat16 or float16"),
    ("mosaic_gpu", "mosaic_gpu: needs "),
    ("native", "native: "),
])
def test_what_cannot_serve_is_refused_at_start_by_its_own_reasons(backend: str, reason: str) -> None:
    """float32, and heads that no kernel but XLA's takes."""
    start = f"attention-backend {backend}: .*: no implementation serves this request. {reason}"
    with pytest.raises(ConfigError, match=start):
        scored(LLAMA, attention_backend=backend)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11")
@pytest.mark.parametrize(("gpu", "codes", "reason"), [
    ("NVIDIA H200", None, None), ("NVIDIA H200", FP8, None), ("NVIDIA H200", FP8_BITS, "codes of uint8 are for CPUs"),
    ("NVIDIA A100", None, "needs an NVIDIA Hopper GPU"),
])
def test_mosaic_gpu_serves_latent_attention_on_hopper_only(gpu: str, codes: str | None, reason: str | None) -> None:
    """A layer of DeepSeek-V2-Lite at its real width, traced for a GPU that is not there."""
    spec = spec_from_config(LATENT["DeepSeek-V2-Lite"] | {"num_hidden_layers": 1})
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    page: Any = jax.ShapeDtypeStruct((8, 1, 16, 576), codes or jnp.bfloat16)
    if codes is not None:
        page = QuantizedPages(page, jax.ShapeDtypeStruct(page.shape[:3], jnp.float32))
    context = StepContext(
        position_T=integers((16,)), row_T=integers((16,)), page_RM=(integers((4, 8)),),
        work=AttentionWork.from_arrays({name: integers(size) for name, size in work_layout(16, 4).items()}),
    )
    attend = functools.partial(paged.attend, implementation="mosaic_gpu")
    model = Decoder(spec=spec, dtype=jnp.bfloat16, attend=attend)

    def run(params: Any, token_T: jax.Array, kv: Any, context: StepContext) -> Any:
        return model.apply({"params": params}, token_T, kv, context, method="hidden")

    arrays = abstract_params(spec, jnp.bfloat16), integers((16,)), (LayerKv(k_PKSH=page, v_PKSH=None),), context
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        if reason is None:
            hidden_TD, kv = jax.eval_shape(run, *arrays)
            assert hidden_TD.shape == (16, 2048) and kv == arrays[2]
        else:
            with pytest.raises(contract.NoImplementationError, match=reason):
                jax.eval_shape(run, *arrays)
