"""Qwen2 and 2.5, QwQ, R1-Distill-Qwen: biases on q, k, v. Qwen3: norms of heads instead. An optional window in both."""

from __future__ import annotations

from jaxserve.core.errors import ModelError
from jaxserve.core.model_spec import Global, HeadNorm, ModelSpec, Span
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import weight_map as weights
from jaxserve.models.outline import gated_mlp, model, outline

__all__ = ["qwen2", "qwen3", "weights"]


def qwen2(config: HfConfig) -> ModelSpec:
    """q, k and v have a bias always, the output projection and the MLP never."""
    frame = outline(config)
    rope, mlp = config.rope(frame.head_dim), gated_mlp(config)
    layers = [
        frame.pre_norm(frame.attention(rope=rope, span=span, has_qkv_bias=True), mlp)
        for span in spans(config, frame.layer_count)
    ]
    return model(config, frame, layers, context=32768)


def qwen3(config: HfConfig) -> ModelSpec:
    """Each head of q and k is normalised."""
    frame = outline(config, head_dim=128)
    rope, mlp = config.rope(frame.head_dim), gated_mlp(config)
    has_bias = config.take("attention_bias", bool, False)
    layers = [
        frame.pre_norm(
            frame.attention(
                rope=rope, span=span, head_norm=HeadNorm(norm=frame.norm, over="head"),
                has_qkv_bias=has_bias, has_out_bias=has_bias,
            ), mlp,
        )
        for span in spans(config, frame.layer_count)
    ]
    return model(config, frame, layers, context=32768)


def spans(config: HfConfig, layer_count: int) -> list[Span]:
    """A window from layer `max_window_layers` on, where `use_sliding_window` says so."""
    is_windowed = config.take("use_sliding_window", bool, False)
    first = config.take("max_window_layers", int, 28)
    if is_windowed:
        return config.spans(
            layer_count, lambda index: "sliding_attention" if index >= first else "full_attention", window=4096
        )
    config.take("sliding_window", int, None)
    if "sliding_attention" in (config.layer_types(layer_count) or ()):
        raise ModelError("config.json: layer_types has 'sliding_attention', but use_sliding_window is false")
    return [Global()] * layer_count
