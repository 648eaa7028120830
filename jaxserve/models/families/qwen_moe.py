"""Qwen1.5-MoE and Qwen2-57B-A14B (a gated shared expert), Qwen3-30B-A3B, 235B and Coder (128 experts, none shared)."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.model_spec import Experts, GatedMlp, HeadNorm, ModelSpec, MoeMlp, Router
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import Outline, model, outline
from jaxserve.models.weight_map import WeightMap


def qwen2(config: HfConfig) -> ModelSpec:
    """Biases on q, k, v."""
    frame = outline(config)
    shared = GatedMlp(width=config.size("shared_expert_intermediate_size", 5632), activation=config.activation())
    moe = replace(_moe(config, experts=60, chosen=4), shared=shared, has_shared_gate=True)
    attention = frame.attention(rope=config.rope(frame.head_dim), has_qkv_bias=config.take("qkv_bias", bool, True))
    return _spec(config, frame, attention, moe)


def qwen3(config: HfConfig) -> ModelSpec:
    """Norms of heads."""
    frame = outline(config, kv_head_count=4)
    has_bias = config.take("attention_bias", bool, False)
    attention = frame.attention(
        rope=config.rope(frame.head_dim), head_norm=HeadNorm(norm=frame.norm, over="head"),
        has_qkv_bias=has_bias, has_out_bias=has_bias,
    )
    return _spec(config, frame, attention, _moe(config, experts=128, chosen=8))


def _moe(config: HfConfig, *, experts: int, chosen: int) -> MoeMlp:
    return MoeMlp(
        experts=Experts(
            count=config.size_of(("num_experts", "num_local_experts"), experts),
            width=config.size("moe_intermediate_size"),
            activation=config.activation(),
        ),
        router=Router(normalise=config.take("norm_topk_prob", bool, False)),
        chosen=config.size("num_experts_per_tok", chosen),
    )


def _spec(config: HfConfig, frame: Outline, attention: object, moe: MoeMlp) -> ModelSpec:
    """A mixture in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    config.expect("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers", "layer_types"):     # nothing slides, whatever these say
        config.take(name, (int, list), None)
    dense = GatedMlp(width=config.size("intermediate_size"), activation=config.activation())
    step, without = config.size("decoder_sparse_step", 1), config.take("mlp_only_layers", list, [])
    layers = [
        frame.pre_norm(attention, dense if index in without or (index + 1) % step else moe)
        for index in range(frame.layer_count)
    ]
    return model(config, frame, layers, context=32768)


def weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(LLAMA, shared="mlp.shared_expert"))
