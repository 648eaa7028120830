"""`--kv-cache-dtype`: keys and values in 8 bits, what they cost in exactness and save in memory, and refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ConfigError
from kernels_pallas.quantized import QuantizedPages
from tests.device.fixture_models import FIXTURES

GEMMA, LLAMA = FIXTURES / "families" / "gemma3", FIXTURES / "tiny-llama3"
LATENT = FIXTURES / "families" / "deepseek-v2-lite"     # keys that are values too
SHAPED = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, prompt_logprobs=1)
PROMPTS = [{"prompt_token_ids": list(range(3 + i, 30 + 5 * i))} for i in range(3)]


def scored(folder: Path, **options: Any) -> tuple[np.ndarray, list[tuple[int, ...]], Any]:
    """Logprobs of prompts (in chunks, so of pages), tokens, and the engine's sizes."""
    with LLM(
        str(folder), max_num_seqs=4, max_num_batched_tokens=16, block_size=8, kv_cache_memory_bytes="1M",
        max_model_len=96, enforce_eager=True, skip_tokenizer_init=True, dtype="float32", **options,
    ) as llm:
        answers = llm.generate(PROMPTS, SHAPED, use_tqdm=False)
        runner = llm._engine.runner
        pages = runner._state.kv[0].k_PKSH
        kept = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), pages)
        sizes = {"pool": runner._setup.memory.groups, "pages": kept}
        logprobs = [
            step[token].logprob for answer, prompt in zip(answers, PROMPTS, strict=True)
            for step, token in zip(answer.prompt_logprobs[1:], prompt["prompt_token_ids"][1:], strict=True)
        ]
        return np.array(logprobs), [answer.outputs[0].token_ids for answer in answers], (sizes, type(pages))


as_it_is = functools.cache(scored)     # once for both kinds of codes


@pytest.mark.parametrize(("folder", "asked", "limit", "limit_each"), [
    pytest.param(LLAMA, "int8", 0.04, 0.25, id="llama-int8"),
    pytest.param(LLAMA, "fp8", 0.2, 1.3, id="llama-fp8", marks=pytest.mark.slow),
    pytest.param(GEMMA, "int8", 0.01, 0.04, id="gemma3-int8", marks=pytest.mark.slow),
    pytest.param(GEMMA, "fp8_e4m3", 0.05, 0.25, id="gemma3-fp8"),
    pytest.param(LATENT, "int8", 0.04, 0.3, id="latent-int8"),
    pytest.param(LATENT, "fp8", 0.2, 1.3, id="latent-fp8", marks=pytest.mark.slow),
])
def test_logprobs_stay_close_and_pages_are_smaller(folder: Path, asked: str, limit: float, limit_each: float) -> None:
    """On average, and of every token. Gemma 3 has windows, hence two pools; a latent cache stores keys only."""
    exact, _, (plain, _) = as_it_is(folder)
    got, _, (sizes, kind) = scored(folder, kv_cache_dtype=asked)
    assert kind is QuantizedPages
    assert 1e-4 < np.abs(got - exact).mean() < limit
    assert np.abs(got - exact).max() < limit_each
    for group, before in zip(sizes["pool"], plain["pool"], strict=True):
        (code_shape, code), (scale_shape, scale) = sizes["pages"]
        assert code.itemsize == 1 and scale == np.float32 and scale_shape == code_shape[:3]
        head_dim = code_shape[-1]
        assert group.page_bytes * 4 * head_dim == before.page_bytes * (head_dim + 4)


def tokens(folder: Path, asked: str, **options: Any) -> tuple[list[list[int]], list[list[int]], int]:
    """Greedy tokens of prompts that repeat themselves, twice, and how many drafts were right."""
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(range(3 + i, 13 + 3 * i)) * 3} for i in range(3)]
    with LLM(
        str(folder), max_num_seqs=4, max_num_batched_tokens=16, block_size=8, kv_cache_memory_bytes="1M",
        max_model_len=128, enforce_eager=True, skip_tokenizer_init=True, dtype="float32", kv_cache_dtype=asked,
        **options,
    ) as llm:
        first, second = (
            [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy, use_tqdm=False)]
            for _ in range(2)
        )
        return first, second, sum(llm.get_metrics().draft_accepted_at)


@pytest.mark.parametrize(("folder", "asked"), [
    pytest.param(GEMMA, "int8", id="gemma3-int8"), pytest.param(LLAMA, "fp8", id="llama-fp8", marks=pytest.mark.slow),
    pytest.param(LATENT, "int8", id="latent-int8", marks=pytest.mark.slow),
])
def test_tokens_do_not_depend_on_how_steps_are_run(folder: Path, asked: str) -> None:
    """Again (with the first run's pages), without overlap, and with drafts that are verified several at a time."""
    expected, again, _ = tokens(folder, asked)
    assert again == expected
    assert tokens(folder, asked, async_scheduling=False)[:2] == (expected, expected)
    found, again, right = tokens(folder, asked, speculative_config={
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
    })
    assert found == again == expected
    assert right > 0, "drafts were verified"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv-cache-dtype bfloat16: the model is computed in float32"):
        scored(LLAMA, kv_cache_dtype="bfloat16")
