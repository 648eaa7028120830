"""The recorded models of tests/fixtures and the demo model's folder, as the device tests use them.

Each tiny folder is a whole checkpoint (tokenizer and chat template too) with transformers' float32 answers beside it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.model_spec import ModelSpec, SlidingWindow, Span
from jaxserve.layers.context import StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.weights.safetensors import read_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY_NAMES = ("tiny-llama3", "tiny-llama-tied", "tiny-llama-bias-sharded", "tiny-qwen2", "tiny-qwen2-window")
SMOLLM2_REFERENCE = FIXTURES / "smollm2_reference.json"
SMOLLM2_FOLDER = Path(
    os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
) / "jaxserve" / "models" / "SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceCase:
    """A prompt, the greedy tokens that follow it and each one's distance to the second best."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    margins: list[float]


def read_cases(path: Path) -> list[ReferenceCase]:
    """The cases of a reference.json."""
    names = ReferenceCase.__dataclass_fields__
    return [
        ReferenceCase(**{name: case[name] for name in names}) for case in json.loads(path.read_text())["cases"]
    ]


def tiny_cases(name: str) -> list[ReferenceCase]:
    return read_cases(FIXTURES / name / "reference.json")


def tiny_logits(name: str) -> list[np.ndarray]:
    """Logits [T, V] of every prompt position, a prompt each."""
    stored = read_file(FIXTURES / name / "reference.safetensors")
    return [stored[f"logits_{i}"].data for i in range(len(stored))]


def attend_densely(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, layer_kv: Any, context: Any, group: int, *,
    scale: float, span: Span, soft_cap: float | None, sink_N: jax.Array | None, value_dim: int | None = None,
) -> tuple[jax.Array, Any]:
    """The oracle of attention: one whole sequence, no cache, every score written out."""
    T, N, _ = q_TNH.shape
    v_TKH = k_TKH[..., :value_dim] if v_TKH is None else v_TKH
    k_TNH, v_TNH = (jnp.repeat(x, N // k_TKH.shape[1], axis=1).astype(jnp.float32) for x in (k_TKH, v_TKH))
    score_NTC = jnp.einsum("TNH,CNH->NTC", q_TNH.astype(jnp.float32), k_TNH) * scale
    if soft_cap is not None:
        score_NTC = soft_cap * jnp.tanh(score_NTC / soft_cap)
    distance_TC = context.position_T[:, None] - context.position_T[None, :]
    window = span.size if isinstance(span, SlidingWindow) else T
    score_NTC = jnp.where((distance_TC >= 0) & (distance_TC < window), score_NTC, -jnp.inf)
    sink_N = jnp.full(N, -jnp.inf) if sink_N is None else sink_N.astype(jnp.float32)
    total_NT1 = jnp.exp(score_NTC).sum(-1, keepdims=True) + jnp.exp(sink_N)[:, None, None]
    return jnp.einsum("NTC,CNH->TNH", jnp.exp(score_NTC) / total_NT1, v_TNH), layer_kv


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def dense_logits(spec: ModelSpec, dtype: str, params: Any, token_T: jax.Array) -> jax.Array:
    """Logits [T, V] of one sequence, computed whole and without a cache."""
    model = Decoder(spec=spec, dtype=jnp.dtype(dtype), attend=attend_densely)
    context = StepContext(position_T=jnp.arange(token_T.shape[0]), row_T=None, page_RM=(), work=None)
    hidden_TD, _ = model.apply({"params": params}, token_T, (None,) * len(spec.layers), context, method="hidden")
    return model.apply({"params": params}, hidden_TD, method="logits")
