"""`--model FILE.gguf`: the same logits as the model's folder, its own tokenizer, packed matrices, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ModelError, UnsupportedModelError, WeightsError
from jaxserve.quantization.packed import PackedTensor
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.weights.folder import read_folder
from jaxserve.weights.safetensors import write_file
from jaxserve.weights.source import locate
from tests.device.packed_folders import CONFIG, HEADS, KV_HEADS, LAYERS, MATRICES, VOCAB, WIDTH
from tests.device.test_quantised_checkpoints import loaded, logits

STORED = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = {
    "embedding_length": WIDTH, "feed_forward_length": 128, "block_count": LAYERS, "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS, "context_length": 128,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter lays them: i and i + half of a head side by side."""
    half = len(weight) // heads // 2
    rows = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def write_model(folder: Path, kind: Any, architecture: str = "llama", **facts: Any) -> tuple[Path, Path]:
    """A GGUF file whose matrices are of one kind, and the plain folder that it stands for."""
    rng, plain = np.random.default_rng(3), {}
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    for name, value in SIZES.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, text in facts.items():
        writer.add_string(name.replace("__", "."), text)
    tokens = [chr(33 + i) for i in range(VOCAB - 3)] + ["Ġ", "ab", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCAB - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCAB - 1)
    embedding = (rng.standard_normal((VOCAB, WIDTH)) * 0.5).astype(np.float32)
    writer.add_tensor("token_embd.weight", embedding)
    plain["model.embed_tokens.weight"] = embedding
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    plain["model.norm.weight"] = np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        for stored, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            norm = (1 + rng.standard_normal(WIDTH) * 0.1).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{stored}.weight", norm)
            plain[f"model.layers.{layer}.{name}.weight"] = norm
        for name, shape in MATRICES.items():
            weight = (rng.standard_normal(shape) * 0.1).astype(np.float32)
            blocks = gguf.quants.quantize(weight, kind)
            plain[f"model.layers.{layer}.{name}.weight"] = gguf.quants.dequantize(blocks, kind)
            if STORED[name] in ("attn_q", "attn_k"):
                blocks = turned(blocks, HEADS if STORED[name] == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{STORED[name]}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "plain").mkdir()
    write_file(folder / "plain" / "model.safetensors", plain)
    (folder / "plain" / "config.json").write_text(json.dumps(CONFIG))
    return folder / "model.gguf", folder / "plain"


@pytest.mark.parametrize(("kind", "code"), [
    ("Q4_1", "int4"), ("F16", None),
])
def test_logits_are_those_of_the_dequantised_folder(kind: str, code: str | None, tmp_path: Path) -> None:
    file, plain = write_model(tmp_path / "model", gguf.GGMLQuantizationType[kind])
    folder = locate(str(file))
    params = loaded(folder)
    down = params["layers_0"]["mlp"]["down"]["weight"]
    assert (down.weight.code if isinstance(down, PackedTensor) else None) == code
    got, expected = logits(folder, params), logits(plain, loaded(plain))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert locate(str(file)) == folder, "made once"


def test_text_goes_in_and_out_by_the_files_own_tokenizer(tmp_path: Path) -> None:
    file, _ = write_model(tmp_path / "model", gguf.GGMLQuantizationType.Q4_1)
    tokenizer = Tokenizer.from_folder(locate(str(file)))
    assert tokenizer.encode("ab 7!") == [VOCAB - 2, VOCAB - 3, ord("7") - 33, 0]
    with LLM(
        str(file), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32, enforce_eager=True,
        kv_cache_memory_bytes="1M", quantization="gguf",
    ) as llm:
        (answer,) = llm.generate(["ab 7!"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert answer.prompt_token_ids == [VOCAB - 2, VOCAB - 3, ord("7") - 33, 0] and len(answer.outputs[0].token_ids) == 4


def test_what_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    with pytest.raises(ModelError, match="there is no file"):
        locate(str(tmp_path / "nowhere.gguf"))
    other, _ = write_model(tmp_path / "other", kind, "falcon")
    with pytest.raises(UnsupportedModelError, match="'falcon' are not served by themselves; supported are llama"):
        locate(str(other))
    scaled, _ = write_model(tmp_path / "scaled", kind, llama__rope__scaling__type="yarn")
    with pytest.raises(UnsupportedModelError, match=r"rope.scaling.type 'yarn'"):
        locate(str(scaled))
    file, _ = write_model(tmp_path / "model", kind)
    with pytest.raises(WeightsError, match=r"no \*.safetensors"):
        read_folder(locate(str(file)), "safetensors")
