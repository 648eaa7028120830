"""Checkpoints that tools of others wrote (auto-round, llm-compressor, GPTQModel, bitsandbytes), against transformers.

The fixtures are one random layer each, as the tool left it; `scripts/make_quantised_fixtures.py` makes them. Logits are
those of the twin that the tool dequantised, and, where rows are rounded, of compressed-tensors' own run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.registry import read_spec
from jaxserve.quantization.packing import is_packed
from jaxserve.weights.safetensors import read_file
from tests.device.fixture_models import FIXTURES, dense_logits
from tests.device.test_quantised_checkpoints import loaded, matrix

FOLDERS = sorted(path for path in (FIXTURES / "quantised").iterdir() if path.is_dir())
# Tools that dequantise in 16 bits.
ROUNDED = {"gptq": "bfloat16", "awq": "bfloat16", "w4a16": "bfloat16", "gptq-desc_act": "float16"}
# Int8 rows: ours (and vLLM's) largest value is 127 steps, the tool's 127.5, which lies between two of them.
LIMITS = dict.fromkeys(ROUNDED, 0.02) | {"w8a8": 0.05}


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_logits_are_those_of_the_tool(folder: Path) -> None:
    """Packed, as far as tool and format agree; and of the matrices alone, rounded as the tool does, exactly."""
    reference = {name: tensor.data for name, tensor in read_file(folder / "reference.safetensors").items()}
    params, spec, dtype = loaded(folder), read_spec(folder), ROUNDED.get(folder.name, "float32")
    assert sum(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed))) == 4, "qkv, out, gate and up, down"

    def apart(tree: Any, expected: np.ndarray) -> float:
        got = np.asarray(dense_logits(spec, "float32", tree, jnp.asarray(reference["prompt"])))
        return float(np.abs(got - expected).max() / np.abs(expected).max())

    assert apart(params, reference.get("run", reference["plain"])) <= LIMITS.get(folder.name, 1e-3)
    plain = jax.tree.map(
        lambda leaf: matrix(leaf).astype(dtype).astype(jnp.float32) if is_packed(leaf) else leaf, params,
        is_leaf=is_packed,
    )
    assert apart(plain, reference["plain"]) <= 1e-3
