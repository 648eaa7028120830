"""Configs as published: each must be read whole, and give the sizes that people know the model by."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from jaxserve.core.model_spec import Attention, ModelSpec, SlidingWindow
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import FAMILIES, family, spec_from_config
from jaxserve.runner.memory import Budget, grant_pages
from tests.device.hub_configs import HUB

# Parameters in billions, as the model's authors count them.
SIZES = {
    "Llama-3.1-8B": 8.03, "Mistral-7B-v0.1": 7.24, "Mistral-7B-Instruct-v0.3": 7.25, "Mistral-Nemo": 12.25,
    "Qwen2.5-7B": 7.62, "Qwen3-0.6B": 0.596, "Phi-3-mini-4k": 3.82, "Phi-4-mini": 3.84, "SmolLM3-3B": 3.08,
    "granite-3.1-2b": 2.53, "OLMo-2-7B": 7.30, "Olmo-3-7B": 7.30, "GLM-4-9B-0414": 9.40, "starcoder2-3b": 3.03,
    "EXAONE-4.0-32B": 32.0, "gemma-2b": 2.51, "gemma-2-9b": 9.24, "gemma-3-1b": 1.00, "gemma-3-4b": 3.88,
    "c4ai-command-r7b": 8.03, "Mixtral-8x7B": 46.7, "Qwen1.5-MoE-A2.7B": 14.3, "Qwen3-30B-A3B": 30.5,
    "OLMoE-1B-7B": 6.92, "gpt-oss-20b": 20.9, "DeepSeek-V2-Lite": 15.7, "DeepSeek-V3-bf16": 671.0,
    "GLM-4.5-Air": 106.9, "gpt2": 0.124, "opt-125m": 0.125, "pythia-70m": 0.0704, "phi-2": 2.78,
}


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_is_read_and_has_the_parameters_it_is_known_for(name: str) -> None:
    spec = spec_from_config(HUB[name])
    params = abstract_params(spec, jnp.bfloat16)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count / 1e9 == pytest.approx(SIZES[name], rel=0.01)
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert paths <= set(family(spec.family).weights(spec).sources), "every parameter has a place in the checkpoint"


def test_every_family_is_there() -> None:
    assert {config["architectures"][0] for config in HUB.values()} == set(FAMILIES)


def windows(spec: ModelSpec) -> list[int | None]:
    return [layer.attention.span.size if isinstance(layer.attention.span, SlidingWindow) else None
            for layer in spec.layers]


def test_spans_are_those_of_the_reports() -> None:
    def of(name: str) -> list[int | None]:
        return windows(spec_from_config(HUB[name]))

    assert set(of("Mistral-7B-v0.1")) == {4096} and set(of("Mistral-7B-Instruct-v0.3")) == {None}
    assert of("gemma-3-4b")[:7] == [1024] * 5 + [None, 1024]
    assert of("gemma-2-9b")[:4] == [4096, None, 4096, None]
    assert of("gpt-oss-20b")[:3] == [128, None, 128]
    assert of("EXAONE-4.0-32B")[:5] == [4096, 4096, 4096, None, 4096] and of("EXAONE-4.0-32B")[-1] is None
    assert of("c4ai-command-r7b")[2:5] == [4096, None, 4096]
    assert set(of("Qwen2.5-7B")) == {None}


def test_latent_caches_are_small() -> None:
    """DeepSeek-V3: 576 numbers a token and layer, whatever its 128 heads."""
    (group,) = spec_from_config(HUB["DeepSeek-V3-bf16"]).kv_groups
    assert group.page_bytes(page_size=1, itemsize=2) == 576 * 61 * 2


def test_what_turns_and_how_far() -> None:
    mini, lite = spec_from_config(HUB["Phi-4-mini"]), spec_from_config(HUB["DeepSeek-V2-Lite"])
    attention = mini.layers[0].attention
    assert isinstance(attention, Attention) and attention.rope is not None
    assert attention.rope.dim == 96 and mini.rope_switch == 4096 and mini.context_length == 131072
    growth = 0.1 * 0.707 * math.log(40) + 1
    assert lite.layers[0].attention.scale == pytest.approx(192**-0.5 * growth**2)
    assert spec_from_config(HUB["SmolLM3-3B"]).layers[3].attention.rope is None


@pytest.mark.parametrize(("name", "share"), [("gemma-3-4b", 0.16), ("gpt-oss-20b", 0.51)])
def test_windows_leave_their_memory_to_long_contexts(name: str, share: float) -> None:
    """Four sequences of 128k: layers with a window need next to nothing, so a pool holds far more tokens."""
    spec = spec_from_config(HUB[name])
    budget = Budget(total_bytes=80 << 30, budget_bytes=72 << 30, reserve_bytes=1 << 30)
    table = grant_pages(
        spec=spec, budget=budget, weight_bytes=0, temporary_bytes=0, state_bytes=0, page_size=16, itemsize=2,
        row_count=4, tokens_max=8192, length_wanted=131072, pool_bytes_wanted=None,
    )
    by_window = {group.window: group for group in table.groups}
    everything = by_window.pop(None)
    (window,) = by_window.values()
    assert everything.page_count * 16 == 4 * 131072 and table.concurrency == 4
    assert window.page_count * 16 <= 4 * (window.window + 32) + 2 * 8192
    whole = sum(group.page_bytes for group in table.groups) * everything.page_count
    assert table.pool_bytes / whole == pytest.approx(share, abs=0.03)
    assert any(f"window {window.window:,}" in line for line in table.lines())
