"""OLMo 2 and 3: norms after attention and MLP instead of before, q and k normalised over all heads; and OLMoE."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.model_spec import Experts, HeadNorm, ModelSpec, MoeMlp, Router, SlidingWindow
from jaxserve.core.rope import Unscaled
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import gated_mlp, model, outline
from jaxserve.models.weight_map import WeightMap


def spec(config: HfConfig) -> ModelSpec:
    """OLMo 3 slides in three of four layers; its scaled rope, if any, is of the others only."""
    is_third = config.architecture.startswith("Olmo3")
    frame = outline(config, epsilon=1e-5)
    theta = 500000.0 if is_third else 10000.0
    ropes = config.ropes(frame.head_dim, ("full_attention", "sliding_attention"), theta=theta)
    if is_third and not config.is_rope_by_kind:
        ropes["sliding_attention"] = replace(ropes["full_attention"], scaling=Unscaled())

    def kind(index: int) -> str:
        return "sliding_attention" if is_third and (index + 1) % 4 else "full_attention"

    has_bias = config.take("attention_bias", bool, False)
    mlp, head_norm = gated_mlp(config), HeadNorm(norm=frame.norm, over="all heads")
    layers = [
        frame.pre_norm(
            frame.attention(
                rope=ropes["sliding_attention" if isinstance(span, SlidingWindow) else "full_attention"], span=span,
                head_norm=head_norm, has_qkv_bias=has_bias, has_out_bias=has_bias,
            ),
            mlp, norm=None, mlp_norm=None, out_norm=frame.norm, mlp_out_norm=frame.norm,
        )
        for span in config.spans(frame.layer_count, kind, window=4096 if is_third else None)
    ]
    return model(config, frame, layers)


def weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(
        LLAMA, out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm"
    ))


def olmoe(config: HfConfig) -> ModelSpec:
    """Llama's block with norms of q and k, optional clipping, and a mixture in every layer."""
    frame = outline(config, epsilon=1e-5)
    has_bias = config.take("attention_bias", bool, False)
    attention = frame.attention(
        rope=config.rope(frame.head_dim), head_norm=HeadNorm(norm=frame.norm, over="all heads"),
        qkv_clip=config.take("clip_qkv", float, None), has_qkv_bias=has_bias, has_out_bias=has_bias,
    )
    mlp = MoeMlp(
        experts=Experts(
            count=config.size_of(("num_experts", "num_local_experts"), 64), width=config.size("intermediate_size"),
            activation=config.activation(),
        ),
        router=Router(normalise=config.take("norm_topk_prob", bool, False)),
        chosen=config.size("num_experts_per_tok", 8),
    )
    return model(config, frame, [frame.pre_norm(attention, mlp)] * frame.layer_count, context=4096)


def olmoe_weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec)
