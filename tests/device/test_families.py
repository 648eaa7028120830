"""Every family against transformers: float32 logits of prompts and 16 decode steps through pages, and greedy tokens.

The checkpoints are tiny and random, made by transformers' own classes; prompts are longer than windows and original
contexts, so that what a family computes beyond them is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.hf import read_config
from jaxserve.models.registry import FAMILIES, read_spec, spec_from_config
from jaxserve.quantization.formats.registry import find_scheme
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.folder import read_folder
from jaxserve.weights.loader import load_params
from jaxserve.weights.safetensors import read_file
from scripts.write_models import models_page
from tests.conftest import ROOT, Shown
from tests.device.fixture_models import FIXTURES, TINY_NAMES, read_cases
from tests.device.paged_forward import chunked_logits
from tests.device.torch_files import from_arrays

FOLDERS = sorted(path for path in (FIXTURES / "families").iterdir() if path.is_dir())
# Second checkpoints of a family whose every mechanism others show, too.
VARIANTS = {
    "llama-yarn-exact", "llama-dynamic", "mistral", "phi3-partial", "qwen3-moe-plain", "gpt-oss", "deepseek-v2-lite",
    "gpt-neox-sequential",
}
NAMES = [folder.name for folder in FOLDERS if folder.name not in VARIANTS]
BOTH = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(VARIANTS))]


@pytest.mark.parametrize("name", BOTH)
def test_logits_and_greedy_tokens_equal_transformers(name: str, shown: Shown) -> None:
    folder = FIXTURES / "families" / name
    spec = read_spec(folder)
    scheme = find_scheme(folder, read_config(folder))
    params = load_params(spec, folder, make_mesh(jax.devices()[:1]), jnp.float32, scheme=scheme)
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
    if name in NAMES:
        shown.note(spec.family, name, "safetensors", jax.default_backend())


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_files_give_the_same_parameters(name: str, tmp_path: Path, shown: Shown) -> None:
    folder = FIXTURES / "families" / name
    spec = read_spec(folder)
    tensors = {key: tensor.data for key, tensor in read_folder(folder).items()}
    mesh = make_mesh(jax.devices()[:1])
    if find_scheme(folder, read_config(folder)) is not None:
        pytest.skip("nobody keeps MXFP4 in PyTorch's format")
    from_arrays(tmp_path / "pytorch_model.bin", tensors)
    found, expected = (load_params(spec, of, mesh, jnp.float32) for of in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shown.note(spec.family, name, "pytorch_model.bin", jax.default_backend())


@pytest.mark.parametrize("name", [folder.name for folder in FOLDERS if (folder / "config.v4.json").exists()])
def test_both_spellings_give_one_spec(name: str) -> None:
    folder = FIXTURES / "families" / name
    assert spec_from_config(json.loads((folder / "config.v4.json").read_text())) == read_spec(folder)


def test_every_family_has_a_checkpoint() -> None:
    folders = [*FOLDERS, *(FIXTURES / name for name in TINY_NAMES)]
    there = {json.loads((folder / "config.json").read_text())["architectures"][0] for folder in folders}
    assert there == set(FAMILIES)


def test_the_table_of_models_is_what_these_tests_showed(shown: Shown, request: pytest.FixtureRequest) -> None:
    """docs/models.md; `make docs` writes it by running this file."""
    if shown.names("safetensors") < set(NAMES):
        pytest.skip("not every family was run, or one failed")
    text = models_page(shown.records)
    page = ROOT / "docs" / "models.md"
    if request.config.getoption("--write-docs"):
        page.write_text(text)
    assert page.read_text() == text, "docs/models.md is old: run `make docs`"
