"""EXAONE 4: norms after attention and MLP, norms of heads, and no positions in the global layers among sliding ones."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.errors import UnsupportedModelError
from jaxserve.core.model_spec import HeadNorm, ModelSpec, SlidingWindow
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import gated_mlp, model, outline
from jaxserve.models.weight_map import WeightMap


def spec(config: HfConfig) -> ModelSpec:
    """Without a window every layer is global and turns."""
    frame = outline(config, epsilon=1e-5)
    pattern = config.take("sliding_window_pattern", (str, int), 4)
    has_window = config.has_window(4096)

    def kind(index: int) -> str:
        if index == frame.layer_count - 1 and isinstance(pattern, str):
            return "full_attention"
        if isinstance(pattern, str) and pattern and set(pattern) <= set("LG"):
            return "sliding_attention" if pattern[index % len(pattern)] == "L" else "full_attention"
        if isinstance(pattern, int) and pattern > 0:
            return "sliding_attention" if (index + 1) % pattern else "full_attention"
        raise UnsupportedModelError(f"config.json: sliding_window_pattern {pattern!r} is neither a count nor L and G")

    rope, mlp, head_norm = config.rope(frame.head_dim), gated_mlp(config), HeadNorm(norm=frame.norm, over="head")
    layers = [
        frame.pre_norm(
            frame.attention(
                rope=rope if isinstance(span, SlidingWindow) or not has_window else None, span=span,
                head_norm=head_norm,
            ),
            mlp, norm=None, mlp_norm=None, out_norm=frame.norm, mlp_out_norm=frame.norm,
        )
        for span in config.spans(frame.layer_count, kind, window=4096)
    ]
    return model(config, frame, layers)


def weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(
        LLAMA, out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm"
    ))
