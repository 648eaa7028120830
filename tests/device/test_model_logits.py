"""The decoder against transformers: float32 logits and greedy tokens of tiny models and of the demo model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.model_spec import ModelSpec, SlidingWindow
from jaxserve.layers.context import StepContext
from jaxserve.models import decoder
from jaxserve.models.decoder import Decoder, abstract_params
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params
from tests.device.fixture_models import (
    FIXTURES,
    SMOLLM2_FOLDER,
    SMOLLM2_REFERENCE,
    TINY_NAMES,
    attend_densely,
    dense_logits,
    read_cases,
    tiny_cases,
    tiny_logits,
)

MARGIN = 1e-4      # two float32 sums of different order may disagree about logits closer than this


@functools.cache
def loaded(name: str, dtype: str = "float32") -> tuple[ModelSpec, Any]:
    spec = read_spec(FIXTURES / name)
    return spec, load_params(spec, FIXTURES / name, make_mesh(jax.devices()[:1]), jnp.dtype(dtype))


@pytest.mark.parametrize("name", TINY_NAMES)
def test_prompt_logits_equal_transformers(name: str) -> None:
    spec, params = loaded(name)
    for case, expected_TV in zip(tiny_cases(name), tiny_logits(name), strict=True):
        logits_TV = dense_logits(spec, "float32", params, np.array(case.prompt_token_ids))
        assert logits_TV.dtype == jnp.float32
        np.testing.assert_allclose(logits_TV, expected_TV, rtol=0, atol=1e-4 * np.abs(expected_TV).max())


@pytest.mark.parametrize("name", TINY_NAMES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    """Teacher-forced: position i of one pass gives the token after i, so one pass checks the whole continuation."""
    spec, params = loaded(name)
    for case in tiny_cases(name):
        sequence = np.array(case.prompt_token_ids + case.token_ids)
        best_T = dense_logits(spec, "float32", params, sequence).argmax(-1)
        assert best_T[len(case.prompt_token_ids) - 1 : -1].tolist() == case.token_ids


def test_fixtures_cover_what_the_families_promise() -> None:
    specs = {name: loaded(name)[0] for name in TINY_NAMES}
    ropes = {type(spec.layers[0].attention.rope.scaling).__name__ for spec in specs.values()}
    assert ropes == {"Unscaled", "Linear", "Llama3"}
    assert {spec.is_tied for spec in specs.values()} == {True, False}
    assert {spec.family for spec in specs.values()} == {"LlamaForCausalLM", "Qwen2ForCausalLM"}
    assert [len(group.layers) for group in specs["tiny-qwen2-window"].kv_groups] == [1, 2]
    assert specs["tiny-qwen2-window"].layers[1].attention.span == SlidingWindow(8)
    assert specs["tiny-llama3"].layers[0].attention.head_dim * 4 != specs["tiny-llama3"].width
    longest = max(len(case.prompt_token_ids) for case in tiny_cases("tiny-llama3"))
    assert longest > specs["tiny-llama3"].layers[0].attention.rope.scaling.original_context_length


def test_bfloat16_stays_near_float32() -> None:
    spec, params = loaded("tiny-llama3")
    _, small = loaded("tiny-llama3", "bfloat16")
    token_T = np.array(tiny_cases("tiny-llama3")[3].prompt_token_ids)
    exact_TV = dense_logits(spec, "float32", params, token_T)
    rounded_TV = dense_logits(spec, "bfloat16", small, token_T)
    assert rounded_TV.dtype == jnp.float32
    error = np.abs(rounded_TV - exact_TV).mean() / np.abs(exact_TV).mean()
    assert 0 < error < 0.03


def test_thirty_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up traces dozens of programs; equal layers must cost one trace, layers that differ one each."""
    traces: list[Any] = []
    plain = decoder.Block.__call__
    monkeypatch.setattr(
        decoder.Block, "__call__", lambda self, *rest: (traces.append(self.spec), plain(self, *rest))[1]
    )
    spec, params = loaded("tiny-qwen2-window")
    jax.clear_caches()
    token_T = jax.ShapeDtypeStruct((4,), jnp.int32)
    jaxpr = jax.make_jaxpr(functools.partial(dense_logits, spec, "float32"))(params, token_T)
    assert len(traces) == 2, "one for the global layer, one for the two windowed ones"
    assert len(set(traces)) == 2
    assert str(jaxpr).count("name=_block") >= 3, "three calls nevertheless"


def test_parameters_are_traced_in_no_wider_type() -> None:
    """No float32 copy of a big bfloat16 weight may appear in the program."""
    spec = read_spec(FIXTURES / "tiny-llama3")
    params = abstract_params(spec, jnp.bfloat16)
    model = Decoder(spec=spec, dtype=jnp.dtype(jnp.bfloat16), attend=attend_densely)

    def run(params: Any, token_T: jax.Array) -> jax.Array:
        context = StepContext(position_T=jnp.arange(4), row_T=None, page_RM=(), work=None)
        hidden_TD, _ = model.apply({"params": params}, token_T, (None,) * 3, context, method="hidden")
        assert hidden_TD.dtype == jnp.bfloat16
        return model.apply({"params": params}, hidden_TD, method="logits")

    text = str(jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((4,), jnp.int32)))
    for leaf in jax.tree.leaves(params):
        if len(leaf.shape) == 2:
            assert f"f32[{leaf.shape[0]},{leaf.shape[1]}]" not in text


@pytest.mark.skipif(not SMOLLM2_FOLDER.is_dir(), reason="the demo model is made by scripts/fetch_demo_model.py")
@pytest.mark.slow     # always-on: the whole engine on the same prompts, in test_engine_references.py
@pytest.mark.timeout(300)
def test_demo_model_greedy_tokens_equal_transformers() -> None:
    """64 tokens after each of 12 prompts, in float32."""
    spec = read_spec(SMOLLM2_FOLDER)
    params = load_params(spec, SMOLLM2_FOLDER, make_mesh(jax.devices()[:1]), jnp.float32)
    cases = read_cases(SMOLLM2_REFERENCE)
    assert len(cases) >= 8 and all(len(case.token_ids) == 64 for case in cases)
    length = max(len(case.prompt_token_ids) for case in cases) + 64
    for case in cases:
        sequence = np.zeros(length, np.int32)     # one shape; what follows a position does not change it
        known = case.prompt_token_ids + case.token_ids
        sequence[: len(known)] = known
        best_T = dense_logits(spec, "float32", params, sequence).argmax(-1)
        found = best_T[len(case.prompt_token_ids) - 1 : len(known) - 1].tolist()
        wrong = [i for i, (a, b) in enumerate(zip(found, case.token_ids, strict=True)) if a != b]
        assert all(case.margins[i] < MARGIN for i in wrong), (case.prompt_token_ids, wrong)
