"""Every family against transformers: float32 logits of prompts and 16 decode steps through pages, and greedy tokens.

The checkpoints are tiny and random, made by transformers' own classes; prompts are longer than windows and original
contexts, so that what a family computes beyond them is seen.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.registry import FAMILIES, read_spec, spec_from_config
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params
from jaxserve.weights.safetensors import read_file
from tests.device.fixture_models import FIXTURES, read_cases
from tests.device.paged_forward import chunked_logits

FOLDERS = sorted(path for path in (FIXTURES / "families").iterdir() if path.is_dir())
NAMES = [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_equal_transformers(name: str) -> None:
    folder = FIXTURES / "families" / name
    spec = read_spec(folder)
    params = load_params(spec, folder, make_mesh(jax.devices()[:1]), jnp.float32)
    cases = read_cases(folder / "reference.json")
    stored = read_file(folder / "reference.safetensors")
    found = chunked_logits(
        spec, params, [case.prompt_token_ids for case in cases], [case.token_ids for case in cases]
    )
    for index, (case, logits_TV) in enumerate(zip(cases, found, strict=True)):
        expected_TV = stored[f"logits_{index}"].data
        assert len(case.token_ids) == 16 and logits_TV.shape == expected_TV.shape
        np.testing.assert_allclose(logits_TV, expected_TV, rtol=0, atol=1e-4 * np.abs(expected_TV).max())
        first = len(case.prompt_token_ids) - 1
        assert logits_TV[first:-1].argmax(-1).tolist() == case.token_ids


@pytest.mark.parametrize("name", [name for name in NAMES if (FIXTURES / "families" / name / "config.v4.json").exists()])
def test_both_spellings_give_one_spec(name: str) -> None:
    folder = FIXTURES / "families" / name
    assert spec_from_config(json.loads((folder / "config.v4.json").read_text())) == read_spec(folder)


def test_every_family_has_a_checkpoint() -> None:
    shown = {json.loads((folder / "config.json").read_text())["architectures"][0] for folder in FOLDERS}
    assert set(FAMILIES) - {"LlamaForCausalLM", "Qwen2ForCausalLM"} <= shown
