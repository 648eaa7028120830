"""The tiny checkpoints of tests/fixtures/families as data: which transformers class, which config, and how a
config.json of transformers 4 spelt it. Each exercises what sets its family apart, past windows and first contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB, WINDOW, ORIGINAL = 96, 8, 32     # prompts are of 5 and 45 tokens
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=ORIGINAL)
RAMP = dict(rope_theta=100.0, beta_fast=2.0, beta_slow=0.5)     # in heads this small other values meet one pair or none
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MLA = dict(
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, num_key_value_heads=4,
    n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, **MOE,
)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Attributes:
    model: transformers class; its config is `config`, or the class's own.
    fields: of the config, over SIZES; None takes a size away.
    version_4: what the old config.json said instead, after the general renaming; None takes an attribute away.
    around_zero: norm weights are stored around zero.
    """

    model: str
    shows: str
    fields: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    version_4: dict[str, Any] = field(default_factory=dict)
    around_zero: bool = False


def longrope(pairs: int) -> dict[str, Any]:
    return dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=[1.0 + 0.1 * i for i in range(pairs)],
        long_factor=[1.5 + i for i in range(pairs)], original_max_position_embeddings=ORIGINAL,
    )


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | fields}


TINY: dict[str, Tiny] = {
    "llama-2": Tiny(model="LlamaForCausalLM", shows="as many kv heads as heads", fields=dict(num_key_value_heads=4)),
    "llama-yarn": Tiny(
        model="LlamaForCausalLM", shows="YaRN, its ramp between pairs",
        fields=dict(head_dim=16, rope_parameters=YARN | RAMP),
    ),
    "llama-yarn-exact": Tiny(
        model="LlamaForCausalLM", shows="YaRN, its ramp not rounded, its own attention factor",
        fields=dict(head_dim=16, rope_parameters=YARN | RAMP | dict(truncate=False, attention_factor=1.3)),
    ),
    "llama-dynamic": Tiny(
        model="LlamaForCausalLM", shows="dynamic NTK, within its context", fields=rope(rope_type="dynamic", factor=2.0)
    ),
    "mistral-window": Tiny(
        model="MistralForCausalLM", shows="a window everywhere, head_dim of its own",
        fields=dict(sliding_window=WINDOW, head_dim=16),
    ),
    "mistral": Tiny(model="MistralForCausalLM", shows="no window", fields=dict(sliding_window=None)),
    "qwen2": Tiny(
        model="Qwen2ForCausalLM", shows="biases of q, k, v; windows from the second layer on",
        fields=dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": Tiny(model="Qwen3ForCausalLM", shows="norms of heads", fields=dict(head_dim=16)),
    "phi3": Tiny(model="Phi3ForCausalLM", shows="fused q, k, v and gate, up; a window",
                 fields=dict(sliding_window=WINDOW)),
    "phi3-partial": Tiny(model="Phi3ForCausalLM", shows="three quarters of a head turn",
                         fields=rope(partial_rotary_factor=0.75)),
    "phi3-longrope": Tiny(model="Phi3ForCausalLM", shows="LongRoPE, short and long",
                          fields=dict(rope_parameters=longrope(4), original_max_position_embeddings=ORIGINAL)),
    "smollm3": Tiny(model="SmolLM3ForCausalLM", shows="every other layer without positions",
                    fields=dict(no_rope_layer_interval=2)),
    "granite": Tiny(
        model="GraniteForCausalLM", shows="four multipliers",
        fields=dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    "olmo2": Tiny(model="Olmo2ForCausalLM", shows="norms after, q and k normalised over all heads"),
    "olmo3": Tiny(
        model="Olmo3ForCausalLM", shows="windows, YaRN in the global layers only",
        fields=dict(
            sliding_window=WINDOW, layer_types=LOCAL_GLOBAL, rope_parameters={
                "full_attention": YARN, "sliding_attention": dict(rope_type="default", rope_theta=10000.0)
            },
        ),
        version_4=dict(layer_types=LOCAL_GLOBAL, rope_scaling={k: v for k, v in YARN.items() if k != "rope_theta"}),
    ),
    "glm4": Tiny(model="Glm4ForCausalLM", shows="half a head turns by neighbours, four norms",
                 fields=dict(head_dim=16)),
    "starcoder2": Tiny(model="Starcoder2ForCausalLM", shows="LayerNorm, biases, a plain MLP, a window",
                       fields=dict(sliding_window=WINDOW)),
    "exaone4": Tiny(
        model="Exaone4ForCausalLM", shows="windows that turn, global layers that do not",
        fields=dict(sliding_window=WINDOW, sliding_window_pattern=4, num_hidden_layers=4),
        version_4=dict(sliding_window_pattern="LLLG"),
    ),
    "gemma": Tiny(
        model="GemmaForCausalLM", shows="scaled embedding, norms around zero, tanh GELU", fields=dict(head_dim=16),
        version_4=dict(hidden_act="gelu", hidden_activation=None), around_zero=True,
    ),
    "gemma2": Tiny(
        model="Gemma2ForCausalLM", shows="caps of scores and logits, a window in every other layer", around_zero=True,
        fields=dict(head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=8.0,
                    query_pre_attn_scalar=24),
    ),
    "gemma3": Tiny(
        model="Gemma3ForCausalLM", config="Gemma3TextConfig", around_zero=True,
        shows="two ropes, the global one stretched eight times; norms of heads",
        fields=dict(
            head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=24, layer_types=LOCAL_GLOBAL, rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            },
        ),
        version_4=dict(sliding_window_pattern=2, rope_scaling=dict(rope_type="linear", factor=8.0),
                       rope_local_base_freq=10000.0),
    ),
    "cohere2": Tiny(
        model="Cohere2ForCausalLM", shows="attention and MLP side by side, one norm, no positions in global layers",
        fields=dict(sliding_window=WINDOW, num_hidden_layers=4, logit_scale=0.25),
        version_4=dict(sliding_window_pattern=4),
    ),
    "mixtral": Tiny(model="MixtralForCausalLM", shows="two of four experts",
                    fields=dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": Tiny(
        model="Qwen2MoeForCausalLM", shows="a gated shared expert; one layer without experts",
        fields=dict(num_experts=4, shared_expert_intermediate_size=24, mlp_only_layers=[0], **MOE),
    ),
    "qwen3-moe": Tiny(model="Qwen3MoeForCausalLM", shows="weights that sum to one",
                      fields=dict(num_experts=8, norm_topk_prob=True, head_dim=16, **MOE)),
    "qwen3-moe-plain": Tiny(
        model="Qwen3MoeForCausalLM", shows="weights that do not; every other layer dense",
        fields=dict(num_experts=4, norm_topk_prob=False, head_dim=16, decoder_sparse_step=2, **MOE),
    ),
    "olmoe": Tiny(model="OlmoeForCausalLM", shows="clipped q, k, v",
                  fields=dict(num_experts=4, num_experts_per_tok=2, clip_qkv=0.8)),
    "gpt-oss": Tiny(
        model="GptOssForCausalLM", shows="sinks, clamped SwiGLU, windows in every other layer, YaRN not rounded",
        fields=dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, intermediate_size=32,
                    sliding_window=WINDOW, swiglu_limit=1.0, rope_parameters=YARN | dict(truncate=False)),
        version_4=dict(layer_types=LOCAL_GLOBAL, experts_per_token=2),
    ),
    "deepseek-v2-lite": Tiny(
        model="DeepseekV2ForCausalLM", shows="latent attention, query not compressed, YaRN with mscale",
        fields=dict(q_lora_rank=None, rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.5), **MLA),
    ),
    "deepseek-v2": Tiny(
        model="DeepseekV2ForCausalLM", shows="compressed query, experts of the best groups only",
        fields=dict(q_lora_rank=12, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                    routed_scaling_factor=1.7, **MLA | dict(num_experts_per_tok=3)),     # more experts than groups
    ),
    "deepseek-v3": Tiny(
        model="DeepseekV3ForCausalLM", shows="sigmoid routing with a correction, in groups; YaRN with mscale",
        fields=dict(q_lora_rank=12, n_group=2, topk_group=1, routed_scaling_factor=2.5,
                    rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8), **MLA),
    ),
    "glm4-moe": Tiny(
        model="Glm4MoeForCausalLM", shows="DeepSeek-V3's mixture under grouped-query attention, norms of heads",
        fields=dict(n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True,
                    attention_bias=True, head_dim=16, **MOE),
    ),
    "gpt2": Tiny(
        model="GPT2LMHeadModel", config="GPT2Config", shows="learned positions, matrices stored transposed",
        fields=dict(n_embd=32, n_layer=2, n_head=4, n_positions=128) | dict.fromkeys(
            ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "max_position_embeddings")
        ),
    ),
    "opt": Tiny(model="OPTForCausalLM", shows="learned positions from row 2 on, ReLU",
                fields=dict(ffn_dim=48, intermediate_size=None, num_key_value_heads=None)),
    "gpt-neox": Tiny(
        model="GPTNeoXForCausalLM", shows="q, k, v fused head by head, a quarter of a head turns, side by side",
        fields=dict(num_key_value_heads=None, hidden_size=64), version_4=dict(rotary_pct=0.25, rotary_emb_base=10000),
    ),
    "gpt-neox-sequential": Tiny(model="GPTNeoXForCausalLM", shows="one after the other",
                                fields=dict(num_key_value_heads=None, hidden_size=64, use_parallel_residual=False)),
    "phi": Tiny(model="PhiForCausalLM", shows="one norm, side by side, biases, a bias of the head"),
}


def version_4_config(content: dict[str, Any], tiny: Tiny) -> dict[str, Any]:
    """A config.json as transformers before 5 wrote it: rope_theta and rope_scaling, torch_dtype, no layer types."""
    config = dict(content)
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    fields = dict(config.pop("rope_parameters", None) or {})
    if "full_attention" in fields:
        config["rope_theta"] = fields["full_attention"]["rope_theta"]
    elif fields:
        part = fields.pop("partial_rotary_factor", None)
        if "rotary_pct" not in tiny.version_4:
            config["rope_theta"] = fields.pop("rope_theta")
            if part is not None:
                config["partial_rotary_factor"] = part
        original = fields.get("original_max_position_embeddings")
        if fields.get("rope_type") == "longrope":
            config["original_max_position_embeddings"] = fields.pop("original_max_position_embeddings", original)
        config["rope_scaling"] = None if fields.get("rope_type") == "default" else fields
    config |= tiny.version_4
    config["transformers_version"] = "4.56.0"
    return {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
