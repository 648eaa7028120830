"""Gemma 1 to 3: norm weights around zero, a scaled embedding, tanh GELU; windows, caps and more norms from 2 on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxserve.core.model_spec import GatedMlp, HeadNorm, ModelSpec, RmsNorm, SlidingWindow, Span
from jaxserve.core.rope import Rope, Unscaled
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import Outline, model, outline
from jaxserve.models.weight_map import WeightMap

KINDS = ("full_attention", "sliding_attention")


def gemma(config: HfConfig) -> ModelSpec:
    """Official checkpoints say "gelu" and mean its tanh form."""
    frame = _frame(config, kv_head_count=16)
    old, new = config.take("hidden_act", str, "gelu"), config.take("hidden_activation", str, None)
    mlp = GatedMlp(width=config.size("intermediate_size"), activation="gelu_tanh")
    if (new or old) not in ("gelu", "gelu_pytorch_tanh"):
        mlp = replace(mlp, activation=config.activation("hidden_activation" if new else "hidden_act"))
    attention = frame.attention(rope=config.rope(frame.head_dim), **_biases(config))
    return _model(config, frame, [frame.pre_norm(attention, mlp)] * frame.layer_count, context=8192)


def gemma2(config: HfConfig) -> ModelSpec:
    """Every other layer slides; scores and logits are capped."""
    config.take("sliding_window_size", int, None)      # sliding_window once more
    frame = _frame(config)
    spans = config.spans(frame.layer_count, lambda i: KINDS[(i + 1) % 2], window=4096)
    ropes = dict.fromkeys(KINDS, config.rope(frame.head_dim))
    layers = _layers(config, frame, spans, ropes, soft_cap=config.take("attn_logit_softcapping", float, 50.0))
    cap = config.take("final_logit_softcapping", float, 30.0)
    return _model(config, frame, layers, context=8192, logit_cap=cap)


def gemma3(config: HfConfig) -> ModelSpec:
    """Five of six layers slide, with a rope of their own; heads of q and k are normalised."""
    frame = _frame(config, head_count=8)
    pattern = config.size("sliding_window_pattern", config.size("_sliding_window_pattern", 6))
    spans = config.spans(frame.layer_count, lambda i: KINDS[min(1, (i + 1) % pattern)], window=4096)
    ropes = config.ropes(frame.head_dim, KINDS, theta=1e6)
    local = config.take("rope_local_base_freq", float, 10000.0)
    if not config.is_rope_by_kind:
        ropes["sliding_attention"] = replace(ropes["full_attention"], theta=local, scaling=Unscaled())
    layers = _layers(
        config, frame, spans, ropes, soft_cap=config.take("attn_logit_softcapping", float, None),
        head_norm=HeadNorm(norm=frame.norm, over="head"),
    )
    cap = config.take("final_logit_softcapping", float, None)
    return _model(config, frame, layers, context=131072, vocab=262208, logit_cap=cap)


def gemma3_text_part(config: HfConfig) -> ModelSpec:
    """What a Gemma 3 with eyes does with text alone."""
    images = ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
              "boi_token_id", "eoi_token_id", "image_token_id")
    return gemma3(config.part("text_config", unused=images))


def _frame(config: HfConfig, *, kv_head_count: int = 4, head_count: int | None = None) -> Outline:
    norm = RmsNorm(epsilon=config.take("rms_norm_eps", float, 1e-6), offset=1.0)
    return outline(config, head_dim=256, kv_head_count=kv_head_count, head_count=head_count, norm=norm)


def _biases(config: HfConfig) -> dict[str, bool]:
    has_bias = config.take("attention_bias", bool, False)
    return {"has_qkv_bias": has_bias, "has_out_bias": has_bias}


def _layers(
    config: HfConfig, frame: Outline, spans: list[Span], ropes: dict[str, Rope], **attention: Any
) -> list[Any]:
    """Norms before and after both attention and MLP."""
    config.take("hidden_act", str, None)      # hidden_activation under its first name, which is not what counts
    mlp = GatedMlp(
        width=config.size("intermediate_size", 9216),
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
    )
    attention |= _biases(config) | {"scale": config.take("query_pre_attn_scalar", float, 256.0) ** -0.5}
    return [
        frame.pre_norm(
            frame.attention(rope=ropes[KINDS[isinstance(span, SlidingWindow)]], span=span, **attention), mlp,
            out_norm=frame.norm, mlp_out_norm=frame.norm,
        )
        for span in spans
    ]


def _model(config: HfConfig, frame: Outline, layers: list[Any], **fields: Any) -> ModelSpec:
    return model(config, frame, layers, is_tied=True, embedding_scale=frame.width**0.5, **fields)


def weights(spec: ModelSpec) -> WeightMap:
    """Towers for images are not read."""
    names = replace(LLAMA, ignorable=(*LLAMA.ignorable, r"(vision_tower|multi_modal_projector)\..*"))
    if spec.layers[0].out_norm is not None:
        names = replace(
            names, out_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
            mlp_out_norm="post_feedforward_layernorm",
        )
    return weight_map(spec, names)
