"""GLM-4 (0414): half of each head turns, by neighbours, and norms stand before and after; GLM-4.5: a mixture."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.model_spec import HeadNorm, ModelSpec
from jaxserve.models.families import deepseek
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import gated_mlp, model, outline
from jaxserve.models.weight_map import WeightMap


def glm4(config: HfConfig) -> ModelSpec:
    """q, k and v have biases; the output projection has none."""
    frame = outline(config, head_dim=128, kv_head_count=2, epsilon=1.5625e-7)
    attention = frame.attention(
        rope=config.rope(frame.head_dim, part=0.5, pairs="neighbours"),
        has_qkv_bias=config.take("attention_bias", bool, True),
    )
    layer = frame.pre_norm(attention, gated_mlp(config), out_norm=frame.norm, mlp_out_norm=frame.norm)
    return model(config, frame, [layer] * frame.layer_count, context=131072)


def glm4_weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(
        LLAMA, gate_up="mlp.gate_up_proj", out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm"
    ))


def glm4_moe(config: HfConfig) -> ModelSpec:
    """DeepSeek-V3's mixture under grouped-query attention."""
    frame = outline(config, kv_head_count=8, epsilon=1e-5)
    has_norm = config.take("use_qk_norm", bool, False)
    attention = frame.attention(
        rope=config.rope(frame.head_dim, part=0.5), has_qkv_bias=config.take("attention_bias", bool, False),
        head_norm=HeadNorm(norm=frame.norm, over="head") if has_norm else None,
    )
    mlps = deepseek.mlps(config, frame.layer_count, deepseek.sigmoid_router(config, groups=1, scale=1.0), dense=1)
    return model(config, frame, [frame.pre_norm(attention, mlp) for mlp in mlps], context=131072)


def glm4_moe_weights(spec: ModelSpec) -> WeightMap:
    return deepseek.weights(spec)
