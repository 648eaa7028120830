"""StarCoder2: LayerNorm, biases everywhere, a plain MLP, and a window of all layers."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.model_spec import LayerNorm, ModelSpec, PlainMlp
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import model, outline
from jaxserve.models.weight_map import WeightMap


def spec(config: HfConfig) -> ModelSpec:
    """`use_bias` is of every projection."""
    frame = outline(
        config, kv_head_count=2, norm=LayerNorm(epsilon=config.take("norm_epsilon", float, 1e-5))
    )
    has_bias, rope = config.take("use_bias", bool, True), config.rope(frame.head_dim)
    config.expect("norm_type", "layer_norm")
    config.expect("mlp_type", "default")
    config.take("activation_function", str, None)    # hidden_act once more
    mlp = PlainMlp(
        width=config.size("intermediate_size"), activation=config.activation(default="gelu_pytorch_tanh"),
        has_bias=has_bias,
    )
    layers = [
        frame.pre_norm(
            frame.attention(rope=rope, span=span, has_qkv_bias=has_bias, has_out_bias=has_bias), mlp
        )
        for span in config.spans(frame.layer_count, lambda _: "sliding_attention")
    ]
    return model(config, frame, layers, is_tied=True, context=4096)


def weights(spec: ModelSpec) -> WeightMap:
    return weight_map(spec, replace(LLAMA, up="mlp.c_fc", down="mlp.c_proj"))
