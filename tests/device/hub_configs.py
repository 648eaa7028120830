"""config.json of models as they lie on the hub: what people will point the server at. Token ids, training and names
are left out; every attribute that could matter, and every odd one, is there as published.
"""

from __future__ import annotations

from typing import Any


def _of(architecture: str, *, heads: int, kv: int, layers: int, width: int, mlp: int, vocab: int, length: int,
        **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture], "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "max_position_embeddings": length, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "transformers_version": "4.51.0", "torch_dtype": "bfloat16", "hidden_act": "silu", **fields,
    }


def _yarn(factor: float, original: int, **fields: Any) -> dict[str, Any]:
    return {
        "beta_fast": 32, "beta_slow": 1, "factor": factor, "original_max_position_embeddings": original, **fields
    }


_LOCAL = ["sliding_attention"]
_GLOBAL = ["full_attention"]

HUB: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _of(
        "LlamaForCausalLM", heads=32, kv=8, layers=32, width=4096, mlp=14336, vocab=128256, length=131072,
        attention_bias=False, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling={"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}, tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.1": _of(
        "MistralForCausalLM", heads=32, kv=8, layers=32, width=4096, mlp=14336, vocab=32000, length=32768,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
    ),
    "Mistral-7B-Instruct-v0.3": _of(
        "MistralForCausalLM", heads=32, kv=8, layers=32, width=4096, mlp=14336, vocab=32768, length=32768,
        rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
    ),
    "Mistral-Nemo": _of(
        "MistralForCausalLM", heads=32, kv=8, layers=40, width=5120, mlp=14336, vocab=131072, length=131072,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
    ),
    "Qwen2.5-7B": _of(
        "Qwen2ForCausalLM", heads=28, kv=4, layers=28, width=3584, mlp=18944, vocab=152064, length=131072,
        max_window_layers=28, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=131072,
        tie_word_embeddings=False, use_mrope=False, use_sliding_window=False,
    ),
    "Qwen3-0.6B": _of(
        "Qwen3ForCausalLM", heads=16, kv=8, layers=28, width=1024, mlp=3072, vocab=151936, length=40960,
        attention_bias=False, head_dim=128, max_window_layers=28, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
    ),
    "Phi-3-mini-4k": _of(
        "Phi3ForCausalLM", heads=32, kv=32, layers=32, width=3072, mlp=8192, vocab=32064, length=4096,
        attention_bias=False, auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, embd_pdrop=0.0,
        original_max_position_embeddings=4096, resid_pdrop=0.0, rms_norm_eps=1e-5, rope_scaling=None,
        rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False,
    ),
    "Phi-4-mini": _of(
        "Phi3ForCausalLM", heads=24, kv=8, layers=32, width=3072, mlp=8192, vocab=200064, length=131072,
        attention_bias=False, embd_pdrop=0.0, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        mlp_bias=False, original_max_position_embeddings=4096, partial_rotary_factor=0.75, resid_pdrop=0.0,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
        rope_scaling={"type": "longrope", "long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48},
    ),
    "SmolLM3-3B": _of(
        "SmolLM3ForCausalLM", heads=16, kv=4, layers=36, width=2048, mlp=11008, vocab=128256, length=65536,
        attention_bias=False, layer_types=_GLOBAL * 36, max_window_layers=28, mlp_bias=False,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False,
    ),
    "granite-3.1-2b": _of(
        "GraniteForCausalLM", heads=32, kv=8, layers=40, width=2048, mlp=8192, vocab=49155, length=131072,
        attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0,
        mlp_bias=False, residual_multiplier=0.22, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=5000000.0,
        tie_word_embeddings=True,
    ),
    "OLMo-2-7B": _of(
        "Olmo2ForCausalLM", heads=32, kv=32, layers=32, width=4096, mlp=11008, vocab=100352, length=4096,
        attention_bias=False, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False,
    ),
    "Olmo-3-7B": _of(
        "Olmo3ForCausalLM", heads=32, kv=32, layers=32, width=4096, mlp=11008, vocab=100278, length=65536,
        attention_bias=False, layer_types=(_LOCAL * 3 + _GLOBAL) * 8, rms_norm_eps=1e-6, rope_theta=500000,
        rope_scaling=_yarn(8.0, 8192, rope_type="yarn", attention_factor=1.2079441541679836), sliding_window=4096,
        tie_word_embeddings=False,
    ),
    "GLM-4-9B-0414": _of(
        "Glm4ForCausalLM", heads=32, kv=2, layers=40, width=4096, mlp=13696, vocab=151552, length=32768,
        attention_bias=True, head_dim=128, partial_rotary_factor=0.5, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "starcoder2-3b": _of(
        "Starcoder2ForCausalLM", heads=24, kv=2, layers=30, width=3072, mlp=12288, vocab=49152, length=16384,
        activation_function="gelu", attention_softmax_in_fp32=True, embedding_dropout=0.1, hidden_act="gelu",
        mlp_type="default", norm_epsilon=1e-5, norm_type="layer_norm", residual_dropout=0.1,
        rope_theta=999999.4420358813, scale_attention_softmax_in_fp32=True, scale_attn_weights=True,
        sliding_window=4096, use_bias=True,
    ),
    "EXAONE-4.0-32B": _of(
        "Exaone4ForCausalLM", heads=40, kv=8, layers=64, width=5120, mlp=27392, vocab=102400, length=131072,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=1000000, sliding_window=4096, sliding_window_pattern="LLLG",
        rope_scaling={"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}, tie_word_embeddings=False,
    ),
    "gemma-2b": _of(
        "GemmaForCausalLM", heads=8, kv=1, layers=18, width=2048, mlp=16384, vocab=256000, length=8192,
        attention_bias=False, head_dim=256, hidden_act="gelu", hidden_activation=None, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=10000.0,
    ),
    "gemma-2-9b": _of(
        "Gemma2ForCausalLM", heads=16, kv=8, layers=42, width=3584, mlp=14336, vocab=256000, length=8192,
        attention_bias=False, attn_logit_softcapping=50.0, cache_implementation="hybrid",
        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=4096, sliding_window_size=4096,
    ),
    "gemma-3-1b": _of(
        "Gemma3ForCausalLM", heads=4, kv=1, layers=26, width=1152, mlp=6912, vocab=262144, length=32768,
        attention_bias=False, attn_logit_softcapping=None, cache_implementation="hybrid",
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None,
        rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    ),
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    },
    "c4ai-command-r7b": _of(
        "Cohere2ForCausalLM", heads=32, kv=8, layers=32, width=4096, mlp=14336, vocab=256000, length=132096,
        attention_bias=False, cache_implementation="hybrid", head_dim=128, layer_norm_eps=1e-5, layer_switch=4,
        logit_scale=0.25, order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
        rope_scaling=None, rope_theta=50000, rotary_pct=1.0, sliding_window=4096, sliding_window_pattern=4,
        use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True, use_parallel_embedding=True,
    ),
    "Mixtral-8x7B": _of(
        "MixtralForCausalLM", heads=32, kv=8, layers=32, width=4096, mlp=14336, vocab=32000, length=32768,
        num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-5,
        rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False,
    ),
    "Qwen1.5-MoE-A2.7B": _of(
        "Qwen2MoeForCausalLM", heads=16, kv=16, layers=24, width=2048, mlp=5632, vocab=151936, length=8192,
        decoder_sparse_step=1, max_window_layers=21, moe_intermediate_size=1408, norm_topk_prob=False,
        num_experts=60, num_experts_per_tok=4, output_router_logits=False, rms_norm_eps=1e-6, rope_theta=1000000.0,
        router_aux_loss_coef=0.001, shared_expert_intermediate_size=5632, sliding_window=32768,
        tie_word_embeddings=False, use_sliding_window=False,
    ),
    "Qwen3-30B-A3B": _of(
        "Qwen3MoeForCausalLM", heads=32, kv=4, layers=48, width=2048, mlp=6144, vocab=151936, length=40960,
        attention_bias=False, decoder_sparse_step=1, head_dim=128, max_window_layers=48, mlp_only_layers=[],
        moe_intermediate_size=768, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8,
        output_router_logits=False, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000.0,
        router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False, use_sliding_window=False,
    ),
    "OLMoE-1B-7B": _of(
        "OlmoeForCausalLM", heads=16, kv=16, layers=16, width=2048, mlp=1024, vocab=50304, length=4096,
        attention_bias=False, clip_qkv=None, norm_topk_prob=False, num_experts=64, num_experts_per_tok=8,
        output_router_logits=False, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
        router_aux_loss_coef=0.01, tie_word_embeddings=False,
    ),
    "gpt-oss-20b": _of(
        "GptOssForCausalLM", heads=64, kv=8, layers=24, width=2880, mlp=2880, vocab=201088, length=131072,
        attention_bias=True, experts_per_token=4, head_dim=64, initial_context_length=4096,
        layer_types=(_LOCAL + _GLOBAL) * 12, num_experts_per_tok=4, num_local_experts=32,
        output_router_logits=False, rms_norm_eps=1e-5, rope_theta=150000,
        rope_scaling=_yarn(32.0, 4096, rope_type="yarn", truncate=False), router_aux_loss_coef=0.9,
        sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
        quantization_config={"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    ),
    "DeepSeek-V2-Lite": _of(
        "DeepseekV2ForCausalLM", heads=16, kv=16, layers=27, width=2048, mlp=10944, vocab=102400, length=163840,
        attention_bias=False, auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        aux_loss_alpha=0.001, first_k_dense_replace=1, kv_lora_rank=512, moe_intermediate_size=1408,
        moe_layer_freq=1, n_group=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False,
        num_experts_per_tok=6, pretraining_tp=1, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
        rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=1.0, scoring_func="softmax", seq_aux=True,
        tie_word_embeddings=False, topk_group=1, topk_method="greedy", v_head_dim=128,
        rope_scaling=_yarn(40, 4096, type="yarn", mscale=0.707, mscale_all_dim=0.707),
    ),
    "DeepSeek-V3-bf16": _of(
        "DeepseekV3ForCausalLM", heads=128, kv=128, layers=61, width=7168, mlp=18432, vocab=129280, length=163840,
        attention_bias=False, aux_loss_alpha=0.001, ep_size=1, first_k_dense_replace=3, kv_lora_rank=512,
        moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1, q_lora_rank=1536,
        qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=2.5,
        scoring_func="sigmoid", seq_aux=True, tie_word_embeddings=False, topk_group=4, topk_method="noaux_tc",
        v_head_dim=128, rope_scaling=_yarn(40, 4096, type="yarn", mscale=1.0, mscale_all_dim=1.0),
    ),
    "GLM-4.5-Air": _of(
        "Glm4MoeForCausalLM", heads=96, kv=8, layers=46, width=4096, mlp=10944, vocab=151552, length=131072,
        attention_bias=True, first_k_dense_replace=1, head_dim=128, moe_intermediate_size=1408, n_group=1,
        n_routed_experts=128, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
        num_nextn_predict_layers=1, partial_rotary_factor=0.5, rms_norm_eps=1e-5, rope_scaling=None,
        rope_theta=1000000, routed_scaling_factor=1.0, tie_word_embeddings=False, topk_group=1, use_qk_norm=False,
    ),
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "embd_pdrop": 0.1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_type": "cls_index", "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "opt-125m": {
        "_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
        "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02,
        "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12,
        "num_hidden_layers": 12, "prefix": "</s>", "torch_dtype": "float16", "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 512,
        "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_parallel_residual": True, "vocab_size": 50304,
    },
    "phi-2": _of(
        "PhiForCausalLM", heads=32, kv=32, layers=32, width=2560, mlp=10240, vocab=51200, length=2048,
        embd_pdrop=0.0, hidden_act="gelu_new", layer_norm_eps=1e-5, partial_rotary_factor=0.4, qk_layernorm=False,
        resid_pdrop=0.1, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False,
    ),
}
