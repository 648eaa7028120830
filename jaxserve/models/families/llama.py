"""Llama 1 to 3, Yi, TinyLlama, SmolLM2, R1-Distill-Llama; and Mistral, which adds a window."""

from __future__ import annotations

from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import weight_map as weights
from jaxserve.models.outline import gated_mlp, model, outline

__all__ = ["mistral", "spec", "weights"]


def spec(config: HfConfig) -> ModelSpec:
    """Pre-norm, rope, grouped-query attention, gated MLP; biases only where the config asks for them."""
    frame = outline(config)
    has_bias = config.take("attention_bias", bool, False)
    attention = frame.attention(rope=config.rope(frame.head_dim), has_qkv_bias=has_bias, has_out_bias=has_bias)
    mlp = gated_mlp(config, has_bias=config.take("mlp_bias", bool, False))
    return model(config, frame, [frame.pre_norm(attention, mlp)] * frame.layer_count)


def mistral(config: HfConfig) -> ModelSpec:
    """Every layer slides where there is a window at all."""
    frame = outline(config, kv_head_count=8)
    rope, mlp = config.rope(frame.head_dim), gated_mlp(config)
    spans = config.spans(frame.layer_count, lambda _: "sliding_attention", window=4096)
    layers = [frame.pre_norm(frame.attention(rope=rope, span=span), mlp) for span in spans]
    return model(config, frame, layers, context=131072)
