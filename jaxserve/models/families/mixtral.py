"""Mixtral 8x7B and 8x22B: Mistral with a mixture of eight in every layer."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.model_spec import Experts, ModelSpec, MoeMlp, Router
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import model, outline
from jaxserve.models.weight_map import WeightMap


def spec(config: HfConfig) -> ModelSpec:
    """The two best experts, weighted by the softmax of their two logits."""
    frame = outline(config, kv_head_count=8, epsilon=1e-5)
    rope = config.rope(frame.head_dim, theta=1e6)
    mlp = MoeMlp(
        experts=Experts(
            count=config.size_of(("num_local_experts", "num_experts"), 8), width=config.size("intermediate_size"),
            activation=config.activation(),
        ),
        router=Router(normalise=True), chosen=config.size("num_experts_per_tok", 2),
    )
    layers = [
        frame.pre_norm(frame.attention(rope=rope, span=span), mlp)
        for span in config.spans(frame.layer_count, lambda _: "sliding_attention")
    ]
    return model(config, frame, layers, context=131072)


def weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(
        LLAMA, router="block_sparse_moe.gate", expert="block_sparse_moe.experts.{}",
        expert_gate="w1", expert_down="w2", expert_up="w3",
    ))
