"""The whole offline engine — pages, chunks, overlap — against transformers' recorded float32 answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from tests.conftest import ROOT
from tests.device.fixture_models import FIXTURES, SMOLLM2_REFERENCE, TINY_NAMES, read_cases, tiny_cases, tiny_logits

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def _llm(folder: Path, cache: Path, **flags: object) -> LLM:
    small = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": "16M", "enforce_eager": True}
    return LLM(str(folder), dtype="float32", compilation_cache_dir=str(cache), **small | flags)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tiny_models_answer_as_transformers(name, compile_cache):
    """16 greedy tokens exactly, all prompts at once, in chunks of at most 32 tokens."""
    cases = tiny_cases(name)
    with _llm(FIXTURES / name, compile_cache) as llm:
        answers = llm.generate(
            [{"prompt_token_ids": case.prompt_token_ids} for case in cases], GREEDY, use_tqdm=False
        )
    assert [list(answer.outputs[0].token_ids) for answer in answers] == [case.token_ids for case in cases]


@pytest.mark.parametrize("name", ["tiny-llama3", "tiny-qwen2-window"])
def test_prompt_logprobs_are_those_of_transformers_logits(name, compile_cache):
    """Every prompt position through the paged engine, in chunks."""
    logits = tiny_logits(name)
    prompts = [case.prompt_token_ids for case in tiny_cases(name)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with _llm(FIXTURES / name, compile_cache) as llm:
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, logits_TV, answer in zip(prompts, logits, answers, strict=True):
        wanted_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
        scored = zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)
        found = [position[token].logprob for position, token in scored]
        expected = [wanted_TV[index, token] for index, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(logits_TV).max())


def test_the_demo_model_answers_as_transformers(demo_model, compile_cache):
    """SmolLM2 itself: 64 greedy tokens for every recorded prompt, batched, in float32."""
    cases = read_cases(SMOLLM2_REFERENCE)
    assert len(cases) >= 8 and all(len(case.token_ids) == 64 for case in cases)
    with _llm(demo_model, compile_cache, max_num_seqs=16, max_num_batched_tokens=256, kv_cache_memory_bytes="1G",
              max_model_len=8192) as llm:
        answers = llm.generate(
            [{"prompt_token_ids": case.prompt_token_ids} for case in cases],
            SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False,
        )
    assert [list(answer.outputs[0].token_ids) for answer in answers] == [case.token_ids for case in cases]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma_3_answers_as_transformers(compile_cache):
    """Gemma 3 270M, fetched by the script (and under its terms): 32 greedy tokens for every prompt, in float32."""
    command = [sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), "gemma3-270m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((FIXTURES / "gemma3_270m_reference.json").read_text())
    assert len(content["cases"]) == 6
    with _llm(Path(done.stdout.strip().splitlines()[-1]), compile_cache, max_num_batched_tokens=64,
              kv_cache_memory_bytes="256M", max_model_len=2048) as llm:
        answers = llm.generate(
            [case["prompt"] for case in content["cases"]],
            SamplingParams(temperature=0, max_tokens=32, ignore_eos=True), use_tqdm=False,
        )
    for case, answer in zip(content["cases"], answers, strict=True):
        assert answer.prompt_token_ids == case["prompt_token_ids"]
        assert list(answer.outputs[0].token_ids) == case["token_ids"]
        assert answer.outputs[0].text == case["text"]
