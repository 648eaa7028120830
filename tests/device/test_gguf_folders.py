"""Folders with a GGUF file, a config.json and nothing else: logits are those of the same weights in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from jaxserve.weights.safetensors import write_file
from jaxserve.weights.source import locate
from tests.device.packed_folders import CONFIG, HEAD_DIM, HEADS, KV_HEADS, LAYERS, MATRICES, VOCAB, WIDTH
from tests.device.test_quantised_checkpoints import answers, logits

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_converted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter leaves them: row r of a head's first half, then row r of its second."""
    rows = []
    for head in range(heads):
        for pair in range(HEAD_DIM // 2):
            rows += [head * HEAD_DIM + pair, head * HEAD_DIM + HEAD_DIM // 2 + pair]
    return weight[rows]


def write_folders(
    folder: Path, kind: Type | None, last: Type | None = None, others: Mapping[str, Type] | None = None
) -> tuple[Path, Path]:
    """One with a GGUF file, one with safetensors of what the gguf package says that the file holds.

    Args:
      last: how the last layer is packed, where it is otherwise.
      others: how some matrices of every layer are packed, by GGUF's names.
    """
    rng, plain = np.random.default_rng(3), {}
    into, beside = folder / "gguf", folder / "plain"
    for path in (into, beside):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    writer = gguf.GGUFWriter(into / "tiny.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)

    def add(name: str, stored: str, values: np.ndarray, heads: int | None = None) -> None:
        ordered = values if heads is None else as_converted(values, heads)
        used = last if last is not None and f".{LAYERS - 1}." in stored else kind
        used = (others or {}).get(stored.split(".")[-2], used)
        if used is None or values.ndim == 1:
            writer.add_tensor(stored, ordered)
            plain[name] = values
            return
        packed = gguf.quantize(ordered, used)
        writer.add_tensor(stored, packed, raw_dtype=used)
        # What a row becomes does not depend on the others.
        plain[name] = gguf.dequantize(gguf.quantize(values, used), used)

    add("model.embed_tokens.weight", "token_embd.weight", rng.normal(size=(VOCAB, WIDTH)).astype(np.float32))
    add("model.norm.weight", "output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for norm, stored in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            values = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
            add(f"model.layers.{layer}.{norm}.weight", f"blk.{layer}.{stored}.weight", values)
        for part, shape in MATRICES.items():
            values = rng.normal(size=shape).astype(np.float32) / 8
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            add(f"model.layers.{layer}.{part}.weight", f"blk.{layer}.{NAMES[part]}.weight", values, heads)
    writer.add_tensor("rope_freqs.weight", np.ones(HEAD_DIM // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_file(beside / "model.safetensors", plain)
    return into, beside


def loaded(folder: Path, scheme: GgufScheme | None) -> Any:
    return load_params(read_spec(folder), folder, make_mesh(jax.devices()[:1]), jnp.float32, scheme=scheme)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (Type.Q4_0, Type.Q5_0, Type.Q5_1)]


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0, None, *SLOW])
def test_logits_are_those_of_the_plain_weights(kind: Type | None, tmp_path: Path) -> None:
    packed, beside = write_folders(tmp_path, kind)
    assert format_of(packed) == "gguf"
    params = loaded(packed, GgufScheme())
    leaves = jax.tree.leaves(params, is_leaf=is_packed)
    assert any(map(is_packed, leaves)) is (kind is not None)
    found, expected = logits(packed, params), logits(beside, loaded(beside, None))
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
