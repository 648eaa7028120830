"""The offline LLM as a user has it: a model folder, real device programs, and nothing left running."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ConfigError


def test_reference_tokens_and_nothing_left_running(tiny_llama: Path, compile_cache: Path) -> None:
    cases = json.loads((tiny_llama / "reference.json").read_text())["cases"]
    before = set(threading.enumerate())
    with LLM(
        str(tiny_llama), dtype="float32", kv_cache_memory_bytes=8_000_000, max_num_seqs=8, enforce_eager=True,
        compilation_cache_dir=str(compile_cache),
    ) as llm:
        prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in cases]
        length = len(cases[0]["token_ids"])
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        results = llm.generate(prompts, params, use_tqdm=False)
        assert [result.outputs[0].token_ids for result in results] == [case["token_ids"] for case in cases]
        assert llm.get_metrics().page_used_count == 0
    assert set(threading.enumerate()) == before


def test_unknown_flag() -> None:
    with pytest.raises(ConfigError, match="max.model.len"):
        LLM("model", max_modellen=5)
