"""Quantised checkpoints on several devices answer as on one; groups that devices cannot share are decoded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.device import gguf_folders, test_gguf_folders
from tests.device.fixture_models import FIXTURES
from tests.device.packed_folders import KINDS, write_folders

SCRIPT = Path(__file__).with_name("sharded_engine.py")
ROOT = Path(__file__).parents[2]
CASES = [{"prompt_token_ids": list(range(3 + i, 12 + 5 * i))} for i in range(3)]


def measured(
    kind: str, sizes: tuple[int, ...], folder: Path, *, has_experts: bool = False
) -> dict[int, dict[str, Any]]:
    packed, _ = (
        write_folders(kind, folder, has_experts=True) if has_experts else gguf_folders.write_quantised(kind, folder)
    )
    (packed / "reference.json").write_text(json.dumps({"cases": CASES}))
    return measured_folder(packed, sizes)


def measured_folder(
    packed: Path, sizes: tuple[int, ...], *, whole_experts: bool = False, **options: Any
) -> dict[int, dict[str, Any]]:
    task = {
        "folder": str(packed), "sizes": sizes, "whole_experts": whole_experts, "is_counted": False, "options": options,
    }
    search = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(task)], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stderr
    return {int(size): of_size for size, of_size in json.loads(done.stdout.splitlines()[-1]).items()}


def assert_alike(found: dict[int, dict[str, Any]]) -> None:
    for size, of_size in found.items():
        assert of_size["tokens"] == found[1]["tokens"], size
        assert of_size["weight_bytes"] == of_size["planned_bytes"], size
        assert of_size["is_as_planned_without_devices"], "what `jaxserve plan` says"


def test_four_bits_on_two_devices(tmp_path: Path) -> None:
    found = measured("gptq-4bit", (1, 2), tmp_path)
    assert_alike(found)
    assert found[2]["weight_bytes"] < 0.6 * found[1]["weight_bytes"]


@pytest.mark.parametrize(("name", "asked"), [
    ("families/gemma3", "int8"), pytest.param("tiny-llama3", "fp8", marks=pytest.mark.slow),
    pytest.param("families/deepseek-v2-lite", "int8", marks=pytest.mark.slow),
])
def test_keys_and_values_in_eight_bits_on_two_devices(name: str, asked: str) -> None:
    """Scales are a token's and a head's, and heads are whole: codes are those of one device. So is a latent cache."""
    found = measured_folder(FIXTURES / name, (1, 2), kv_cache_dtype=asked)
    assert_alike(found)
    assert found[2]["shaped"] == found[1]["shaped"]
    np.testing.assert_allclose(found[2]["logprobs"], found[1]["logprobs"], atol=2e-4)
    assert found[2]["page_bytes"] * (1 if found[2]["is_latent"] else 2) == found[1]["page_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "asked", "sizes"), [
    ("tiny-llama3", "int8", (1, 2, 4)), ("tiny-qwen2", "int8", (1, 2, 4)),
    ("tiny-llama3", "fp8", (1, 2)),     # four devices would have 24 inputs of `down`: no whole groups of 16
])
def test_weights_packed_by_the_server_on_several_devices(name: str, asked: str, sizes: tuple[int, ...]) -> None:
    """An output that lies on several devices has one scale, and so has a row of activations: codes are those of one
    device, but for activations that another order of float32 sums rounds to the other side of a tie. Integers are
    added up as such."""
    found = measured_folder(FIXTURES / name, sizes, quantization=asked)
    for size in sizes[1:]:
        assert found[size]["weight_bytes"] < 1.2 / size * found[1]["weight_bytes"], "nothing is decoded"
        off = np.abs(np.subtract(found[size]["scores"], found[1]["scores"]))
        assert np.median(off) < 1e-5 and off.mean() < 1e-3, (size, off.mean(), off.max())
        assert asked == "fp8" or found[size]["tokens"] == found[1]["tokens"], size


@pytest.mark.slow
def test_mxfp4_experts_split_over_two_devices() -> None:
    found = measured_folder(FIXTURES / "families" / "gpt-oss-mxfp4", (1, 2))
    assert_alike(found)
    assert found[2]["weight_bytes"] < 0.7 * found[1]["weight_bytes"], "half of the experts, packed"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (1, 2, 4)])
def test_parts_of_several_kinds_on_several_devices(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Four devices have a copy of a key and value head each."""
    packed, _ = gguf_folders.write_folders(tmp_path, Type.Q4_1, others=test_gguf_folders.MIXED)
    (packed / "reference.json").write_text(json.dumps({"cases": CASES}))
    found = measured_folder(packed, sizes)
    assert_alike(found)
    assert found[2]["weight_bytes"] < 0.6 * found[1]["weight_bytes"], "nothing is decoded"


@pytest.mark.slow
@pytest.mark.parametrize("whole_experts", [False, True])
def test_mxfp4_experts_on_four_devices(*, whole_experts: bool) -> None:
    assert_alike(measured_folder(FIXTURES / "families" / "gpt-oss-mxfp4", (1, 2, 4), whole_experts=whole_experts))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *gguf_folders.KINDS])
def test_every_format_on_two_and_four_devices(kind: str, tmp_path: Path) -> None:
    assert_alike(measured(kind, (1, 2, 4), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["awq", "ct-fp8"])
def test_packed_experts_on_two_and_four_devices(kind: str, tmp_path: Path) -> None:
    assert_alike(measured(kind, (1, 2, 4), tmp_path, has_experts=True))
