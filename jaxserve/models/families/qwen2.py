"""The Qwen2 family: Qwen2 and 2.5, QwQ, R1-Distill-Qwen. Llama with biases on q, k, v and an optional window."""

from __future__ import annotations

from jaxserve.core.errors import ModelError
from jaxserve.core.model_spec import Attention, DenseMlp, Global, LayerSpec, ModelSpec, SlidingWindow, Span
from jaxserve.models.families import llama
from jaxserve.models.hf import HfConfig

weights = llama.weights


def spec(config: HfConfig) -> ModelSpec:
    """Sizes as in Llama; q, k and v have a bias always, the output projection and the MLP never."""
    width, head_count = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", max(1, width // head_count))
    epsilon = config.take("rms_norm_eps", float, 1e-6)
    rope = config.rope(head_dim)
    kv_head_count = config.size("num_key_value_heads")
    mlp = DenseMlp(width=config.size("intermediate_size"), activation=config.activation())

    def layer(span: Span) -> LayerSpec:
        attention = Attention(
            head_count=head_count, kv_head_count=kv_head_count, head_dim=head_dim,
            rope=rope, span=span, scale=head_dim**-0.5, has_qkv_bias=True,
        )
        return LayerSpec(attention=attention, mlp=mlp, norm_epsilon=epsilon)

    return ModelSpec(
        family=config.architecture,
        width=width,
        vocab_size=config.size("vocab_size"),
        layers=tuple(layer(span) for span in spans(config, config.size("num_hidden_layers"))),
        norm_epsilon=epsilon,
        is_tied=config.take("tie_word_embeddings", bool, False),
        context_length=config.size("max_position_embeddings", 32768),
        dtype=config.dtype(),
    )


def spans(config: HfConfig, layer_count: int) -> list[Span]:
    """What each layer sees: a window from layer `max_window_layers` on, where `use_sliding_window` says so."""
    is_windowed = config.take("use_sliding_window", bool, False)
    size = config.size("sliding_window", 4096)
    first = config.take("max_window_layers", int, 28)
    kinds = config.layer_types(layer_count)
    if kinds is None:
        kinds = ["sliding_attention" if is_windowed and i >= first else "full_attention" for i in range(layer_count)]
    if not is_windowed and "sliding_attention" in kinds:
        raise ModelError("config.json: layer_types has 'sliding_attention', but use_sliding_window is false")
    return [SlidingWindow(size) if kind == "sliding_attention" else Global() for kind in kinds]
