"""Granite 3: Llama with four multipliers, of the embedding, the scores, the residual stream and the logits."""

from __future__ import annotations

from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import weight_map as weights
from jaxserve.models.outline import gated_mlp, model, outline

__all__ = ["spec", "weights"]


def spec(config: HfConfig) -> ModelSpec:
    """Scores are scaled by `attention_multiplier` alone; logits are divided by `logits_scaling`."""
    frame = outline(config)
    has_bias = config.take("attention_bias", bool, False)
    attention = frame.attention(
        rope=config.rope(frame.head_dim), scale=config.take("attention_multiplier", float, 1.0),
        has_qkv_bias=has_bias, has_out_bias=has_bias,
    )
    mlp = gated_mlp(config, has_bias=config.take("mlp_bias", bool, False))
    layer = frame.pre_norm(attention, mlp, residual_scale=config.take("residual_multiplier", float, 1.0))
    return model(
        config, frame, [layer] * frame.layer_count,
        embedding_scale=config.take("embedding_multiplier", float, 1.0),
        logit_scale=1.0 / config.take("logits_scaling", float, 1.0),
    )
