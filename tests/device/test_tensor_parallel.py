"""Several devices answer as one does, hold a part each, and send no more than they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCRIPT = Path(__file__).with_name("sharded_engine.py")
ROOT = Path(__file__).parents[2]


def measured(
    name: str, sizes: tuple[int, ...], *, whole_experts: bool = False, is_counted: bool = False, **options: Any
) -> dict[int, dict[str, Any]]:
    folder = FIXTURES / name
    task = {
        "folder": str(folder), "sizes": sizes, "whole_experts": whole_experts, "is_counted": is_counted,
        "options": options,
    }
    search = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(task)], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stderr
    found = {int(size): of_size for size, of_size in json.loads(done.stdout.splitlines()[-1]).items()}
    cases = json.loads((folder / "reference.json").read_text())["cases"]
    expected = [case["token_ids"][:16] for case in cases]
    for size, of_size in found.items():
        assert of_size["tokens"] == expected + expected[::-1], (name, size)
        assert of_size["weight_bytes"] == of_size["planned_bytes"]
        assert of_size["pool_bytes"] == of_size["planned_pool_bytes"]
        assert of_size["is_as_planned_without_devices"], "what `jaxserve plan` says"
    return found


def assert_alike(found: dict[int, dict[str, Any]]) -> None:
    """Shaped sampling and logprobs, of outputs and prompts, are those of one device."""
    for size, of_size in found.items():
        assert of_size["shaped"] == found[1]["shaped"], size
        np.testing.assert_allclose(of_size["logprobs"], found[1]["logprobs"], atol=2e-4, err_msg=str(size))


def test_a_dense_model_on_several_devices_and_what_they_send():
    """Qwen2 with two kv heads on three devices, which divide none of its sizes."""
    found = measured("tiny-qwen2", (1, 3), is_counted=True)
    assert_alike(found)
    layer_count = json.loads((FIXTURES / "tiny-qwen2" / "config.json").read_text())["num_hidden_layers"]
    assert all(not of_program for of_program in found[1]["collectives"].values())
    sent = found[3]["collectives"]
    assert sent["begin"] == {"all-reduce": 1}, "the embedding"
    assert sent["layers"] == {"all-reduce": 2 * layer_count}, "after attention-out and mlp-down"
    assert sent["finish"] == {}
    assert sent["sample"] == {"all-to-all": 1, "all-gather": 1}, "logits to rows; the tokens"
    assert sent["score"] == {"all-to-all": 1}, "a prompt's logprobs stay where they were computed"
    assert found[3]["page_bytes"] * 2 == found[1]["page_bytes"], "two kv heads: at most one on each"


def test_experts_shared_out_whole():
    found = measured("families/qwen3-moe", (2,), whole_experts=True, is_counted=True)
    assert set(found[2]["collectives"]["layers"]) == {"all-reduce"}


@pytest.mark.parametrize(("name", "sizes"), [
    ("tiny-qwen2", (3,)), pytest.param("families/qwen3-moe", (1, 2, 4, 8), marks=pytest.mark.slow),
])
def test_a_model_that_drafts_is_split_too(name, sizes):
    """The model as its own draft: what it computes is what comes true, unless a device had a part of it wrong."""
    drafting = {"method": "draft_model", "model": str(FIXTURES / name), "num_speculative_tokens": 3}
    found = measured(name, sizes, is_counted=True, speculative_config=drafting)
    for size, of_size in found.items():
        assert of_size["drafts_accepted"] > 0.6, size
        if size > 1:    # steps of 16 samples, scores of 16 positions, drafts of 16 rows at most
            assert all(count <= -(-16 // size) for count in of_size["whole_rows"].values()), of_size["whole_rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama3", "tiny-qwen2"])
def test_kernels_of_pallas_on_several_devices(name):
    """Triton's, interpreted: each device runs them on its own heads and pages."""
    found = measured(name, (1, 2, 4), attention_backend="triton")
    assert_alike(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "tiny-llama3", "tiny-llama-bias-sharded", "tiny-qwen2", "families/gemma3", "families/qwen3-moe",
    "families/deepseek-v3", "families/gpt-oss-mxfp4", "families/cohere2", "families/phi3-longrope", "families/opt",
    "families/olmo2",
])
def test_families_on_two_four_and_eight_devices(name):
    found = measured(name, (1, 2, 4, 8), is_counted=True)
    assert_alike(found)
    for size in (2, 4, 8):
        assert "all-gather" not in found[size]["collectives"]["layers"], size
        assert found[size]["weight_bytes"] < found[size // 2]["weight_bytes"]
        if found[1]["is_latent"]:
            assert found[size]["page_bytes"] == found[1]["page_bytes"]
        else:
            assert found[size]["page_bytes"] * min(2, size) <= found[1]["page_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["families/qwen3-moe", "families/deepseek-v3", "families/gpt-oss"])
def test_whole_experts_on_two_and_four_devices(name):
    assert_alike(measured(name, (1, 2, 4), whole_experts=True))
