"""`--quantization int8`: its arithmetic to the letter, its place in loading and memory, and what it refuses."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ConfigError
from jaxserve.layers.context import StepContext
from jaxserve.models.decoder import Decoder, abstract_params
from jaxserve.models.registry import read_spec
from jaxserve.quantization import int8
from jaxserve.quantization.int8 import Int8Tensor
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params
from jaxserve.weights.packed import plan_online
from jaxserve.weights.random import random_params
from tests.device.fixture_models import attend_densely
from tests.device.test_quantised_checkpoints import BORDER, products_beside

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA, QWEN = FIXTURES / "tiny-llama-tied", FIXTURES / "tiny-qwen2"


def codes_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scheme written down once more, in float64."""
    scale = np.abs(values).max(-1, keepdims=True).astype(np.float64) / 127
    return np.rint(np.divide(values, scale, out=np.zeros_like(values, np.float64), where=scale > 0)), scale


def tensor_of(weight: np.ndarray) -> Int8Tensor:
    like = int8.abstract(jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=placement("model", None)))
    return int8.make(like, lambda rows: weight[rows], np.empty)


def placement(*axes: str | None) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(make_mesh(jax.devices()[:1]), jax.sharding.PartitionSpec(*axes))


@pytest.mark.parametrize("width", [16, 24, 800])
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
def test_products_are_those_of_the_formula(rows, width):
    random = np.random.default_rng(width)
    x = random.standard_normal((rows, width)).astype(np.float32)
    weight = random.standard_normal((40, width)).astype(np.float32)
    weight[7], x[0, 3] = 0, 30.0        # a row of zeros, and an outlier
    (x_codes, x_scale), (codes, scale) = codes_of(x), codes_of(weight)
    tensor = tensor_of(weight)
    assert np.array_equal(tensor.codes_OI, codes) and tensor.shape == weight.shape
    expected = (x_codes @ codes.T) * x_scale * scale.T
    got = jax.jit(lambda t, a: t.matmul(a))(tensor, x)
    assert got.dtype == jnp.float32
    # A value that lies on the border of two codes may fall to either: one code of difference.
    np.testing.assert_allclose(got, expected, atol=float((np.abs(codes).max() * scale * x_scale.max()).max()) * 1.01)
    assert np.median(np.abs(got - expected)) <= 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(tensor.take(jnp.array([2, 7])), (codes * scale)[[2, 7]], rtol=1e-6)


def test_large_matrices_are_quantised_in_slices_and_may_be_sharded(monkeypatch):
    """Column slices too get the scale of their whole row."""
    monkeypatch.setattr(int8, "CHUNK_BYTES", 4 * 48 * 5)
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    codes, scale = codes_of(weight)
    mesh = make_mesh(jax.devices(), min(4, len(jax.devices())))
    for axes in (("model", None), (None, "model")):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        like = int8.abstract(jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=sharding))
        made = int8.make(like, lambda rows: weight[rows], np.empty)
        assert np.array_equal(made.codes_OI, codes) and made.codes_OI.sharding == sharding
        np.testing.assert_allclose(made.scale_O, scale[:, 0], rtol=1e-6)
        assert made.scale_O.sharding.spec == jax.sharding.PartitionSpec(axes[0])


@pytest.mark.parametrize("folder", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_logits_are_those_of_dequantised_weights_and_rounded_activations(folder, monkeypatch):
    spec, mesh = read_spec(folder), make_mesh(jax.devices()[:1])
    packed = load_params(spec, folder, mesh, jnp.float32, packing=plan_online(spec, "int8", mesh))
    plain = load_params(spec, folder, mesh, jnp.float32)
    kinds = {type(leaf) for leaf in jax.tree.leaves(packed["layers_0"], is_leaf=lambda x: isinstance(x, QTensor))}
    assert Int8Tensor in kinds and not isinstance(packed["embedding"]["weight"], QTensor)
    tokens = jnp.arange(3, 40)
    got = dense_logits(spec, packed, tokens)

    def reference(self: Int8Tensor, x: jax.Array) -> jax.Array:
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) / 127, 1e-30)
        seen = jnp.round(x / scale) * scale
        weight = self.codes_OI.astype(jnp.float32) * self.scale_O[:, None]
        return jnp.matmul(seen, weight.T, precision="highest")

    apart = products_beside(monkeypatch, (Int8Tensor,), reference).apart
    expected = dense_logits(spec, packed, tokens)
    jax.effects_barrier()
    assert apart and max(apart) <= 1e-5, "for the same rows"
    limit = np.abs(expected).max()
    assert np.abs(got - expected).max() <= BORDER * limit
    rounding = np.abs(got - dense_logits(spec, plain, tokens)).max()
    assert 1e-3 * limit < rounding < 0.1 * limit, "rounding shows, but little"


def dense_logits(spec, params, tokens):
    # Equal blocks share a trace, which would outlive a product that a test replaces: this attention equals no other.
    model = Decoder(spec=spec, dtype=jnp.float32, attend=functools.partial(attend_densely))
    context = StepContext(position_T=jnp.arange(len(tokens)), row_T=jnp.zeros_like(tokens), page_RM=(), work=None)
    hidden, _ = model.apply({"params": params}, tokens, (None,) * len(spec.layers), context, method="hidden")
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))


def test_the_parameters_take_the_bytes_that_were_planned():
    spec = read_spec(LLAMA)
    mesh = make_mesh(jax.devices()[:1])
    packing = plan_online(spec, "int8", mesh)
    planned = abstract_params(spec, jnp.bfloat16, mesh, packing)
    for made in (
        load_params(spec, LLAMA, mesh, jnp.bfloat16, packing=packing),
        random_params(spec, mesh, jnp.bfloat16, packing=packing),
    ):
        assert jax.tree.structure(made) == jax.tree.structure(planned)
        kinds = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (made, planned))
        assert next(kinds) == next(kinds)

    def layers(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree["layers_0"]) if leaf.ndim == 2)

    assert 2 * layers(planned) == layers(abstract_params(spec, jnp.bfloat16))


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "experts"), ("deepseek-v2", "(experts|latent attention)")])
def test_models_it_would_hardly_touch_are_refused(family, kind):
    spec = read_spec(FIXTURES / "families" / family)
    with pytest.raises(ConfigError, match=f"quantization int8 is not built yet for {kind}"):
        plan_online(spec, "int8", make_mesh(jax.devices()[:1]))


def test_an_answer_does_not_depend_on_the_batch():
    """Integer sums are exact: tokens and logprobs alone equal those in a crowd, to the bit, in float32."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(3 + i, 9 + 3 * i))} for i in range(6)]
    with LLM(
        str(LLAMA), quantization="int8", dtype="float32", max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64,
        kv_cache_memory_bytes="4M",
    ) as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
