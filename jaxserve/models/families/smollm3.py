"""SmolLM3: Llama in which every fourth layer knows no positions (NoPE)."""

from __future__ import annotations

from jaxserve.core.errors import ModelError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import weight_map as weights
from jaxserve.models.outline import gated_mlp, model, outline

__all__ = ["spec", "weights"]


def spec(config: HfConfig) -> ModelSpec:
    """`no_rope_layers` has a 1 where a layer does turn; windows, where used, are of the layers that do not."""
    frame = outline(config, kv_head_count=4)
    interval = config.size("no_rope_layer_interval", 4)
    turns = config.take("no_rope_layers", list, [int((i + 1) % interval != 0) for i in range(frame.layer_count)])
    if len(turns) < frame.layer_count:
        raise ModelError(f"config.json: no_rope_layers has {len(turns)} entries for {frame.layer_count} layers")
    config.take("max_window_layers", int, None)      # copied from Qwen, where it means something
    is_windowed = config.take("use_sliding_window", bool, False)
    spans = config.spans(
        frame.layer_count, lambda i: "sliding_attention" if is_windowed and not turns[i] else "full_attention"
    )
    rope, has_bias = config.rope(frame.head_dim, theta=2e6), config.take("attention_bias", bool, False)
    mlp = gated_mlp(config, has_bias=config.take("mlp_bias", bool, False))
    layers = [
        frame.pre_norm(frame.attention(
            rope=rope if turn else None, span=span, has_qkv_bias=has_bias, has_out_bias=has_bias
        ), mlp)
        for turn, span in zip(turns, spans, strict=False)
    ]
    return model(config, frame, layers, is_tied=True, context=32768)
