"""A tiny random model and runners over it, for the device tests; and its continuation without any cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.config import CacheConfig, CompilationConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.core.model_spec import Attention, GatedMlp, Global, LayerSpec, ModelSpec, RmsNorm, SlidingWindow
from jaxserve.core.progress import NoProgress
from jaxserve.core.rope import Rope
from jaxserve.layers.context import StepContext
from jaxserve.models.decoder import Decoder, abstract_params
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.runner import Runner
from jaxserve.runner.setup import RunnerSetup
from jaxserve.runner.start import plan_memory
from jaxserve.sharding.mesh import make_mesh
from tests.device.fixture_models import attend_densely

VOCAB = 97
PAGE_SIZE = 4


def tiny_spec(*, window: int | None = None, is_tied: bool = False) -> ModelSpec:
    """Two layers; with a window the second one slides, which makes two KV groups."""
    def layer(span: Global | SlidingWindow) -> LayerSpec:
        attention = Attention(
            head_count=4, kv_head_count=2, head_dim=16, rope=Rope(theta=10_000.0, dim=16), span=span, scale=0.25
        )
        norm = RmsNorm(epsilon=1e-5)
        return LayerSpec(attention=attention, mlp=GatedMlp(width=64), norm=norm, mlp_norm=norm)

    return ModelSpec(
        family="LlamaForCausalLM", width=32, vocab_size=VOCAB,
        layers=(layer(Global()), layer(SlidingWindow(window) if window else Global())),
        final_norm=RmsNorm(epsilon=1e-5), is_tied=is_tied, context_length=64, dtype="float32",
    )


def tiny_params(spec: ModelSpec, seed: int = 0) -> Any:
    """Random weights, large enough that greedy margins are wide."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape) * (0.5 if len(leaf.shape) > 1 else 0.1) + (len(leaf.shape) == 1)
        return jax.device_put(jnp.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract_params(spec, jnp.float32, tiny_mesh()))


def tiny_mesh() -> jax.sharding.Mesh:
    return make_mesh(jax.devices()[:1])


def tiny_config(
    *, store: Path, rows: int = 8, tokens: int = 32, pages: int = 64, length: int | None = 64, group_count: int = 1,
    **model: Any,
) -> EngineConfig:
    page_bytes = 2 * 2 * 2 * 16 * PAGE_SIZE * 4     # keys and values, two layers, two heads of 16, float32
    return EngineConfig(
        model=ModelConfig(model="tiny", max_model_len=length, max_logprobs=5, **model),
        cache=CacheConfig(block_size=PAGE_SIZE, kv_cache_memory_bytes=pages * page_bytes),
        scheduler=SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=tokens),
        compilation=CompilationConfig(compilation_cache_dir=str(store)),
    )


def tiny_setup(spec: ModelSpec, params: Any, config: EngineConfig) -> RunnerSetup:
    return plan_memory(spec=spec, params=params, mesh=tiny_mesh(), dtype=jnp.dtype(jnp.float32), config=config)


def tiny_runner(spec: ModelSpec, params: Any, config: EngineConfig, buckets: Buckets | None = None) -> Runner:
    """A runner with every bucket compiled: those of the configuration, or these fewer ones."""
    setup = tiny_setup(spec, params, config)
    runner = Runner.create(setup=replace(setup, buckets=buckets or setup.buckets), params=params)
    runner.compile_serving_set(NoProgress())
    runner.compile_rest(NoProgress())
    assert runner.wait_ready(240)
    return runner


@functools.partial(jax.jit, static_argnames="spec")
def _dense_logits(spec: ModelSpec, params: Any, token_T: jax.Array) -> jax.Array:
    model = Decoder(spec=spec, dtype=jnp.float32, attend=attend_densely)
    context = StepContext(
        position_T=jnp.arange(token_T.shape[0]), row_T=jnp.zeros_like(token_T), page_RM=(), work=None
    )
    hidden_TD, _ = model.apply({"params": params}, token_T, (None,) * len(spec.layers), context, method="hidden")
    return model.apply({"params": params}, hidden_TD, method="logits")


def dense_logits(spec: ModelSpec, params: Any, tokens: Sequence[int]) -> np.ndarray:
    """Float32 logits of every position of one sequence; padded so that one shape is compiled."""
    padded = np.zeros(64, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_dense_logits(spec, params, padded))[: len(tokens)]


def continuation(spec: ModelSpec, params: Any, prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens, each from the whole sequence anew."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logits(spec, params, tokens)[-1].argmax()))
    return tokens[len(prompt):]


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
