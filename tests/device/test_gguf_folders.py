"""Folders with a GGUF file, a config.json and nothing else: logits are those of the same weights in safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jaxserve.core.errors import ModelError
from jaxserve.models.registry import read_spec
from jaxserve.quantization.formats.gguf import GgufScheme
from jaxserve.quantization.joined import JoinedTensor
from jaxserve.quantization.packing import is_packed
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.folder import format_of
from jaxserve.weights.loader import load_params
from jaxserve.weights.source import locate
from tests.device.gguf_folders import write_folders
from tests.device.packed_folders import VOCAB, WIDTH
from tests.device.test_quantised_checkpoints import answers, logits


def loaded(folder: Path, scheme: GgufScheme | None) -> Any:
    return load_params(read_spec(folder), folder, make_mesh(jax.devices()[:1]), jnp.float32, scheme=scheme)


def test_a_file_of_plain_matrices_has_the_logits_of_the_folder(tmp_path: Path) -> None:
    """Packed ones: test_quantised_checkpoints.py."""
    folder, beside = write_folders(tmp_path, None)
    assert format_of(folder) == "gguf"
    params = loaded(folder, GgufScheme())
    assert not any(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed)))
    found, expected = logits(folder, params), logits(beside, loaded(beside, None))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


MIXED = {"attn_v": Type.Q8_0, "ffn_up": Type.Q5_0}


def test_parts_of_a_fused_matrix_stay_packed_in_their_own_kinds(tmp_path: Path) -> None:
    packed, beside = write_folders(tmp_path, Type.Q4_1, others=MIXED)
    params, plain = loaded(packed, GgufScheme()), loaded(beside, None)
    for path, codes, bits in (("self_attn/qkv", ["int4", "int8"], 5.9375), ("mlp/gate_up", ["int4", "int8"], 6.875)):
        at, name = path.replace("self_attn", "attention").split("/")
        tensor, expected = (tree["layers_0"][at][name]["weight"] for tree in (params, plain))
        assert isinstance(tensor, JoinedTensor) and tensor.shape == expected.shape
        assert [part.weight.code for part in tensor.parts] == codes
        assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(tensor)) == bits * expected.size
        np.testing.assert_allclose(tensor.plain(), expected, rtol=1e-6, atol=1e-7)
    found, expected = logits(packed, params), logits(beside, plain)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    short = logits(packed, load_params(
        read_spec(packed), packed, make_mesh(jax.devices()[:1]), jnp.bfloat16, scheme=GgufScheme()
    ), jnp.bfloat16)
    np.testing.assert_allclose(short, expected, atol=0.06 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("last", [None, Type.Q4_1])
def test_the_engine_finds_the_format_itself(tmp_path: Path, last: Type | None) -> None:
    packed, plain = write_folders(tmp_path, Type.Q8_0, last)
    assert answers(packed) == answers(plain)


@pytest.mark.parametrize(
    ("architecture", "name", "named"),
    [
        ("mamba", "token_embd.weight", "architecture 'mamba'"),
        ("llama", "blk.0.ssm_a.weight", "'blk.0.ssm_a.weight' is none"),
    ],
)
def test_other_architectures_and_tensors_are_refused_by_name(
    tmp_path: Path, architecture: str, name: str, named: str
) -> None:
    folder, _ = write_folders(tmp_path, None)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", architecture)
    writer.add_tensor(name, np.ones((VOCAB, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=named):
        loaded(folder, GgufScheme())


def test_a_repository_is_not_searched_for_gguf_files() -> None:
    with pytest.raises(ModelError, match="download one into a folder"):
        locate("owner/name-GGUF", load_format="gguf")
