"""GPT-2, OPT and GPT-NeoX (Pythia): the models that tests and research still use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxserve.core.model_spec import LayerNorm, LearnedPositions, ModelSpec, PlainMlp
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, rows_of, transposed, weight_map
from jaxserve.models.outline import Outline, model, outline
from jaxserve.models.weight_map import Section, WeightMap


def gpt2(config: HfConfig) -> ModelSpec:
    """Learned positions, LayerNorm, biases everywhere."""
    width, heads = config.size("n_embd", 768), config.size("n_head", 12)
    frame = Outline(
        width=width, head_count=heads, kv_head_count=heads, head_dim=width // heads,
        layer_count=config.size("n_layer", 12),
        norm=LayerNorm(epsilon=config.take("layer_norm_epsilon", float, 1e-5)),
    )
    length = config.size("n_positions", config.size("n_ctx", 1024))
    config.expect("scale_attn_by_inverse_layer_idx", False)
    is_scaled = config.take("scale_attn_weights", bool, True)
    attention = frame.attention(
        rope=None, scale=frame.head_dim**-0.5 if is_scaled else 1.0, has_qkv_bias=True, has_out_bias=True
    )
    mlp = PlainMlp(
        width=config.size("n_inner", 4 * width), activation=config.activation("activation_function", "gelu_new")
    )
    return model(
        config, frame, [frame.pre_norm(attention, mlp)] * frame.layer_count, is_tied=True,
        context_length=length, positions=LearnedPositions(count=length),
    )


def gpt2_weights(spec: ModelSpec) -> WeightMap:
    """Matrices lie as [in, out]; masks are stored beside them."""
    return weight_map(spec, replace(
        LLAMA, layer="h.{}", embedding="wte", positions="wpe", final_norm="ln_f", norm="ln_1", mlp_norm="ln_2",
        qkv="attn.c_attn", attention_out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj", view=transposed,
        ignorable=(r"h\.\d+\.attn\.(bias|masked_bias)",), prefixes=("transformer.",),
    ))


def opt(config: HfConfig) -> ModelSpec:
    """Learned positions from row 2 on; only the form with norms before (all sizes but 350M)."""
    config.expect("do_layer_norm_before", True)
    config.expect("_remove_final_layer_norm", False)
    config.expect("layer_norm_elementwise_affine", True)
    frame = outline(config, norm=LayerNorm(epsilon=1e-5))
    frame = replace(frame, kv_head_count=frame.head_count)
    config.expect("word_embed_proj_dim", frame.width)
    has_bias, length = config.take("enable_bias", bool, True), config.size("max_position_embeddings", 2048)
    attention = frame.attention(rope=None, has_qkv_bias=has_bias, has_out_bias=has_bias)
    mlp = PlainMlp(
        width=config.size("ffn_dim"), activation=config.activation("activation_function", "relu"), has_bias=has_bias
    )
    return model(
        config, frame, [frame.pre_norm(attention, mlp)] * frame.layer_count, is_tied=True,
        positions=LearnedPositions(count=length, offset=2),
    )


def opt_weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(
        LLAMA, positions="embed_positions", final_norm="final_layer_norm", norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm", attention_out="self_attn.out_proj", up="fc1", down="fc2",
        prefixes=("model.decoder.", "decoder.", "model."),
    ))


def gpt_neox(config: HfConfig) -> ModelSpec:
    """A quarter of each head turns; attention and MLP side by side, each with its own norm."""
    frame = outline(config, norm=LayerNorm(epsilon=config.take("layer_norm_eps", float, 1e-5)))
    frame = replace(frame, kv_head_count=frame.head_count)
    has_bias = config.take("attention_bias", bool, True)
    rope = config.rope(
        frame.head_dim, theta=config.take("rotary_emb_base", float, 10000.0),
        part=config.take("rotary_pct", float, 0.25),
    )
    is_parallel = config.take("use_parallel_residual", bool, True)
    layer = frame.pre_norm(
        frame.attention(rope=rope, has_qkv_bias=has_bias, has_out_bias=has_bias),
        PlainMlp(width=config.size("intermediate_size"), activation=config.activation(default="gelu")),
        order="parallel" if is_parallel else "sequential",
    )
    return model(config, frame, [layer] * frame.layer_count)


def gpt_neox_weights(spec: ModelSpec) -> WeightMap:
    """Rows of the fused tensor go head by head: its q, its k, its v."""
    found = weight_map(spec, replace(
        LLAMA, embedding="embed_in", final_norm="final_layer_norm", head="embed_out",
        attention_out="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ignorable=(*LLAMA.ignorable, r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
        prefixes=("gpt_neox.",),
    ))
    for index, layer in enumerate(spec.layers):
        fused = f"layers.{index}.attention.query_key_value"
        for kind in ("weight", "bias"):
            found.sources[f"layers_{index}/attention/qkv/{kind}"] = tuple(
                section for part in range(3) for section in _heads(f"{fused}.{kind}", layer.attention, part)
            )
    return found


def _heads(name: str, attention: Any, part: int) -> list[Section]:
    rows = attention.head_dim
    return [
        Section(name=name, rows=rows, view=rows_of((3 * head + part) * rows, (3 * head + part + 1) * rows))
        for head in range(attention.head_count)
    ]
