"""Command R7B and A (Cohere2): one LayerNorm a block, attention and MLP side by side, no positions in global layers."""

from __future__ import annotations

from jaxserve.core.model_spec import LayerNorm, ModelSpec, SlidingWindow
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import weight_map as weights
from jaxserve.models.outline import gated_mlp, model, outline

__all__ = ["spec", "weights"]


def spec(config: HfConfig) -> ModelSpec:
    """Three of four layers slide and turn, by neighbours; logits are multiplied by `logit_scale`."""
    frame = outline(
        config, norm=LayerNorm(epsilon=config.take("layer_norm_eps", float, 1e-5), has_bias=False)
    )
    pattern = config.size("sliding_window_pattern", 4)
    spans = config.spans(
        frame.layer_count, lambda i: "sliding_attention" if (i + 1) % pattern else "full_attention", window=4096
    )
    rope = config.rope(frame.head_dim, pairs="neighbours")
    has_bias, mlp = config.take("attention_bias", bool, False), gated_mlp(config)
    layers = [
        frame.pre_norm(
            frame.attention(
                rope=rope if isinstance(span, SlidingWindow) else None, span=span,
                has_qkv_bias=has_bias, has_out_bias=has_bias,
            ),
            mlp, mlp_norm=None, order="parallel",
        )
        for span in spans
    ]
    for name, value in (
        ("layer_switch", pattern), ("order_of_interleaved_layers", "local_attn_first"),
        ("position_embedding_type", "rope_gptj"), ("rotary_pct", 1.0), ("use_embedding_sharing", True),
        ("use_gated_activation", True), ("use_parallel_block", True),
    ):
        config.expect(name, value)
    scale = config.take("logit_scale", float, 0.0625)
    return model(config, frame, layers, is_tied=True, context=8192, logit_scale=scale)
