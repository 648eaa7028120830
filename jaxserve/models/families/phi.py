"""Phi-3, 3.5 and 4 (fused projections, LongRoPE); and the older Phi-1 and 2 (one norm a block, LayerNorm, biases)."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.model_spec import HeadNorm, LayerNorm, ModelSpec, PlainMlp
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import gated_mlp, model, outline
from jaxserve.models.weight_map import WeightMap


def phi3(config: HfConfig) -> ModelSpec:
    """Llama with rows of q, k, v and of gate, up already fused."""
    frame = outline(config, epsilon=1e-5)
    rope, mlp = config.rope(frame.head_dim, part=1.0), gated_mlp(config)
    spans = config.spans(frame.layer_count, lambda _: "sliding_attention")
    layers = [frame.pre_norm(frame.attention(rope=rope, span=span), mlp) for span in spans]
    return model(config, frame, layers, context=4096)


def phi3_weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(LLAMA, qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"))


def phi(config: HfConfig) -> ModelSpec:
    """Attention and MLP see the same normalised stream."""
    norm = LayerNorm(epsilon=config.take("layer_norm_eps", float, 1e-5))
    frame = outline(config, norm=norm)
    head_norm = HeadNorm(norm=norm, over="head") if config.take("qk_layernorm", bool, False) else None
    attention = frame.attention(
        rope=config.rope(frame.head_dim, part=0.5), head_norm=head_norm, has_qkv_bias=True, has_out_bias=True
    )
    mlp = PlainMlp(width=config.size("intermediate_size"), activation=config.activation(default="gelu_new"))
    layer = frame.pre_norm(attention, mlp, mlp_norm=None, order="parallel")
    return model(config, frame, [layer] * frame.layer_count, has_head_bias=True)


def phi_weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(
        LLAMA, attention_out="self_attn.dense", q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm",
        up="mlp.fc1", down="mlp.fc2", final_norm="final_layernorm",
    ))
