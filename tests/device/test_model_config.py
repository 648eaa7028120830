"""config.json to ModelSpec: both spellings, every attribute handled, ignorable or an error with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.core.model_spec import Global, RmsNorm, SlidingWindow
from jaxserve.core.rope import Linear, Llama3, Rope
from jaxserve.layers.rope import frequencies
from jaxserve.models.hf import read_config
from jaxserve.models.precision import compute_dtype
from jaxserve.models.registry import FAMILIES, read_spec, spec_from_config
from tests.device.fixture_models import FIXTURES, TINY_NAMES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 100,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
LLAMA3 = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


@pytest.mark.parametrize("name", TINY_NAMES)
def test_both_spellings_give_one_spec(name: str) -> None:
    folder = FIXTURES / name
    old = json.loads((folder / "config.v4.json").read_text())
    assert ("rope_theta" in old) and ("rope_parameters" not in old) and ("torch_dtype" in old)
    assert spec_from_config(old) == read_spec(folder)


def test_spec_of_a_plain_llama() -> None:
    spec = spec_from_config(LLAMA)
    layer = spec.layers[0]
    assert spec.layers == (layer, layer) and hash(spec) == hash(spec_from_config(LLAMA))
    assert (spec.width, spec.vocab_size, spec.context_length, spec.dtype) == (64, 100, 128, "bfloat16")
    assert layer.attention.rope == Rope(theta=500000.0, dim=16)
    assert layer.attention.scale == 0.25 and layer.norm == RmsNorm(epsilon=1e-5)
    assert not (layer.attention.has_qkv_bias or layer.attention.has_out_bias or layer.mlp.has_bias or spec.is_tied)


def test_explicit_head_dim_and_biases() -> None:
    layer = spec_from_config({**LLAMA, "head_dim": 32, "attention_bias": True, "mlp_bias": True}).layers[0]
    assert layer.attention.head_dim == 32 and layer.attention.rope.dim == 32
    assert layer.attention.has_qkv_bias and layer.attention.has_out_bias and layer.mlp.has_bias


def test_ropes() -> None:
    def rope(**fields: Any) -> Any:
        return spec_from_config({**LLAMA, **fields}).layers[0].attention.rope

    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    }
    expected = Rope(theta=5e5, dim=16, scaling=LLAMA3)
    assert rope(rope_scaling={"rope_type": "llama3", **scaling}) == expected
    assert rope(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}) == expected
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == Rope(theta=5e5, dim=16, scaling=Linear(factor=2.0))
    assert rope(rope_scaling={"type": "default", "rope_type": "default"}) == Rope(theta=5e5, dim=16)
    for bad, named in (
        ({"rope_type": "proportional", "factor": 4.0}, "proportional"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
        ({"rope_type": "linear", "type": "llama3", "factor": 2.0}, "rope type None"),
        ({"full_attention": {"rope_type": "default"}}, "layer type"),
    ):
        with pytest.raises(UnsupportedModelError, match=named):
            rope(rope_scaling=bad)
    with pytest.raises(ModelError, match=r"rope_scaling\.factor is None"):
        rope(rope_scaling={"rope_type": "linear"})
    with pytest.raises(ModelError, match=r"rope_scaling\.original_max_position_embeddings is None"):
        rope(rope_scaling={"rope_type": "yarn", "factor": 4.0})


def test_llama3_frequencies_against_the_definition_by_cases() -> None:
    rope = Rope(theta=5e5, dim=128, scaling=LLAMA3)
    plain = frequencies(Rope(theta=5e5, dim=128))
    for found, frequency in zip(frequencies(rope), plain, strict=True):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert found == pytest.approx(expected, rel=1e-12)


def test_qwen2_has_biases_on_q_k_v_only() -> None:
    attention = spec_from_config(QWEN2).layers[0].attention
    assert attention.has_qkv_bias and not attention.has_out_bias and attention.span == Global()


def test_qwen2_windows() -> None:
    def spans(**fields: Any) -> list[Any]:
        spec = spec_from_config({**QWEN2, "num_hidden_layers": 4, "sliding_window": 16, **fields})
        return [layer.attention.span for layer in spec.layers]

    window, whole = SlidingWindow(16), Global()
    assert spans(use_sliding_window=False, max_window_layers=2) == [whole] * 4
    assert spans(use_sliding_window=True, max_window_layers=2) == [whole, whole, window, window]
    kinds = ["sliding_attention", "full_attention"] * 2
    assert spans(use_sliding_window=True, layer_types=kinds) == [window, whole] * 2
    with pytest.raises(ModelError, match="use_sliding_window is false"):
        spans(layer_types=["sliding_attention"] * 4)
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        spans(layer_types=["full_attention"] * 3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "full attention only"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config({**LLAMA, **fields})


def test_what_changes_nothing_is_accepted() -> None:
    harmless = {
        "use_cache": False, "pretraining_tp": 2, "attention_dropout": 0.1, "initializer_range": 0.3, "auto_map": {},
        "some_future_field": None, "partial_rotary_factor": 1.0, "rope_interleaved": False, "eos_token_id": [1, 2],
    }
    assert spec_from_config({**LLAMA, **harmless}) == spec_from_config(LLAMA)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected int"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"architectures": None}, "hf-overrides"),
    ],
)
def test_malformed_values_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        spec_from_config({**LLAMA, **fields})


def test_unknown_architectures_list_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_from_config({**LLAMA, "architectures": ["LLamaForCausalLM"]})
    assert all(name in str(caught.value) for name in FAMILIES) and "nearest is LlamaForCausalLM" in str(caught.value)


def test_overrides_come_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "softcap": 1, "rope_scaling": {"type": "yarn"}}))
    scaling = {"type": "linear", "factor": 3.0}
    spec = read_spec(tmp_path, {"softcap": None, "num_hidden_layers": 1, "rope_scaling": scaling})
    expected = Rope(theta=5e5, dim=16, scaling=Linear(factor=3.0))
    assert len(spec.layers) == 1 and spec.layers[0].attention.rope == expected
    assert read_config(tmp_path, {"rope_scaling": {"factor": 2}})["rope_scaling"] == {"type": "yarn", "factor": 2}


def test_folders_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_spec(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="JSON"):
            read_spec(tmp_path)


def test_compute_dtype() -> None:
    assert compute_dtype("auto", "bfloat16", "cpu") == ("bfloat16", None)
    assert compute_dtype("auto", "float16", "gpu") == ("float16", None)
    dtype, remark = compute_dtype("auto", "float16", "cpu")
    assert dtype == "bfloat16" and remark is not None and "converted" in remark
    assert compute_dtype("auto", "float32", "cpu")[0] == "bfloat16"
    assert compute_dtype("float32", "bfloat16", "cpu") == ("float32", None)
    assert "slower" in (compute_dtype("float16", "float16", "cpu")[1] or "")
