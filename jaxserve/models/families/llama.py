"""The Llama family: Llama 1 to 3, Yi, TinyLlama, SmolLM2, R1-Distill-Llama and their finetunes."""

from __future__ import annotations

from jaxserve.core.errors import UnsupportedModelError
from jaxserve.core.model_spec import Attention, DenseMlp, LayerSpec, ModelSpec
from jaxserve.models.hf import HfConfig
from jaxserve.models.weight_map import Section, WeightMap


def spec(config: HfConfig) -> ModelSpec:
    """Pre-norm, rope, grouped-query attention, gated MLP; biases only where the config asks for them."""
    width, head_count = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", max(1, width // head_count))
    layer_count = config.size("num_hidden_layers")
    if "sliding_attention" in (config.layer_types(layer_count) or ()):
        raise UnsupportedModelError("config.json: layer_types has 'sliding_attention', which Llama does not compute")
    has_bias = config.take("attention_bias", bool, False)
    epsilon = config.take("rms_norm_eps", float, 1e-6)
    layer = LayerSpec(
        attention=Attention(
            head_count=head_count,
            kv_head_count=config.size("num_key_value_heads", head_count),
            head_dim=head_dim,
            rope=config.rope(head_dim),
            scale=head_dim**-0.5,
            has_qkv_bias=has_bias,
            has_out_bias=has_bias,
        ),
        mlp=DenseMlp(
            width=config.size("intermediate_size"),
            activation=config.activation(),
            has_bias=config.take("mlp_bias", bool, False),
        ),
        norm_epsilon=epsilon,
    )
    return ModelSpec(
        family=config.architecture,
        width=width,
        vocab_size=config.size("vocab_size"),
        layers=(layer,) * layer_count,
        norm_epsilon=epsilon,
        is_tied=config.take("tie_word_embeddings", bool, False),
        context_length=config.size("max_position_embeddings", 2048),
        dtype=config.dtype(),
    )


def weights(spec: ModelSpec) -> WeightMap:
    """q, k, v and gate, up fused along their rows."""
    sources = {
        "embedding/weight": (Section(name="embed_tokens.weight"),),
        "final_norm/weight": (Section(name="norm.weight"),),
        "head/weight": (Section(name="lm_head.weight"),),
    }
    for index, layer in enumerate(spec.layers):
        here, there, attention = f"layers_{index}", f"layers.{index}", layer.attention
        q_rows, kv_rows = attention.head_count * attention.head_dim, attention.kv_head_count * attention.head_dim
        for kind in ("weight", "bias"):
            sources[f"{here}/attention/qkv/{kind}"] = (
                Section(name=f"{there}.self_attn.q_proj.{kind}", rows=q_rows),
                Section(name=f"{there}.self_attn.k_proj.{kind}", rows=kv_rows),
                Section(name=f"{there}.self_attn.v_proj.{kind}", rows=kv_rows),
            )
            sources[f"{here}/attention/out/{kind}"] = (Section(name=f"{there}.self_attn.o_proj.{kind}"),)
            sources[f"{here}/mlp/gate_up/{kind}"] = (
                Section(name=f"{there}.mlp.gate_proj.{kind}", rows=layer.mlp.width),
                Section(name=f"{there}.mlp.up_proj.{kind}", rows=layer.mlp.width),
            )
            sources[f"{here}/mlp/down/{kind}"] = (Section(name=f"{there}.mlp.down_proj.{kind}"),)
        sources[f"{here}/attention_norm/weight"] = (Section(name=f"{there}.input_layernorm.weight"),)
        sources[f"{here}/mlp_norm/weight"] = (Section(name=f"{there}.post_attention_layernorm.weight"),)
    tied = (r"lm_head\.weight",) if spec.is_tied else ()
    return WeightMap(sources=sources, ignorable=(r"(.*\.)?rotary_emb\.inv_freq", *tied))
