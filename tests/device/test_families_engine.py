"""The whole offline engine on families that ask something of it: windows, latent caches, mixtures, sinks, two ropes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.layers.context import StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params
from tests.device.fixture_models import FIXTURES, attend_densely, read_cases

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def _llm(name: str, cache: Path, **flags: Any) -> LLM:
    """Pages of eight slots, steps of at most sixteen tokens: everything happens in pieces."""
    small = {
        "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 8, "kv_cache_memory_bytes": "1M",
        "enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32", "compilation_cache_dir": str(cache),
    }
    return LLM(str(FIXTURES / "families" / name), **small | flags)


def _tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


NAMES = ("gemma3", "mistral-window", "deepseek-v3", "gpt-oss-mxfp4")


@pytest.mark.parametrize("name", NAMES)
def test_answers_as_transformers_alone_together_and_again(name, compile_cache):
    """Prompts in chunks beside decodes, then once more from the prefix cache."""
    cases = read_cases(FIXTURES / "families" / name / "reference.json")
    prompts, expected = [case.prompt_token_ids for case in cases], [case.token_ids for case in cases]
    with _llm(name, compile_cache) as llm:
        assert _tokens(llm, prompts + prompts[::-1]) == expected + expected[::-1]
        assert _tokens(llm, [prompts[1]]) == [expected[1]]
        again = llm.generate([{"prompt_token_ids": prompts[1]}], GREEDY, use_tqdm=False)[0]
        assert again.num_cached_tokens >= len(prompts[1]) // 8 * 8 - 8


def test_a_sequence_that_outgrows_the_first_context_is_computed_anew(compile_cache):
    """LongRoPE turns every key another way once a sequence is longer than 32: as if it had been long from the start."""
    folder = FIXTURES / "families" / "phi3-longrope"
    spec = read_spec(folder)
    assert spec.rope_switch == 32
    params = load_params(spec, folder, make_mesh(jax.devices()[:1]), jnp.float32)
    model = Decoder(spec=spec, dtype=jnp.float32, attend=attend_densely)

    @jax.jit
    def logits(token_T: jax.Array, is_long: jax.Array) -> jax.Array:
        T = token_T.shape[0]
        context = StepContext(
            position_T=jnp.arange(T), row_T=None, page_RM=(), work=None, is_long_T=jnp.full(T, is_long)
        )
        hidden_TD, _ = model.apply({"params": params}, token_T, (None,) * len(spec.layers), context, method="hidden")
        return model.apply({"params": params}, hidden_TD, method="logits")

    def continued(prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(16):
            padded = np.zeros(64, np.int32)
            padded[: len(tokens)] = tokens
            tokens.append(int(logits(padded, len(tokens) > 32)[len(tokens) - 1].argmax()))
        return tokens[len(prompt):]

    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 96, length).tolist() for length in (20, 25, 31, 32, 33)]
    expected = [continued(prompt) for prompt in prompts]
    for flags in ({}, {"async_scheduling": False, "enable_prefix_caching": False}):
        with _llm("phi3-longrope", compile_cache, **flags) as llm:
            assert _tokens(llm, prompts) == expected, flags
