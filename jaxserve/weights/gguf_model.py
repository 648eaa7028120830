"""A folder for a GGUF file that stands alone: its config.json and its tokenizer, from the file's facts.

    m.gguf -> ~/.cache/jaxserve/gguf/m-<digest>/{config.json, tokenizer.json, tokenizer_config.json, weights.json}

The folder has everything but the weights, which stay in the file that weights.json names. Where the file's tokenizer is
of a kind that is not known to be exact, there is no tokenizer.json, and --tokenizer must name a folder.
Sources: ggml's docs/gguf.md; the tokenizers of the models' own folders, which llama.cpp's test vectors agree with.
Invariant: a folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.weights import gguf
from jaxserve.weights.files import StoredTensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Facts = Mapping[str, Any]

POINTER = "weights.json"        # of the folder: {"gguf": path}
CONTROL, USER_DEFINED = 3, 4    # kinds of tokens

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What byte-level tokenizers split text by, by GGUF's name; None: digits one by one, then as GPT-2.
SPLITS = {"smollm": None, "llama-bpe": WORDS % "{1,3}", "qwen2": WORDS % ""}


def _llama(facts: Facts) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "mlp_bias": False,
            "attention_bias": False}


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}


def _qwen3(facts: Facts) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
            "attention_bias": False, "head_dim": facts["qwen3.attention.key_length"]}


def _gemma3(facts: Facts) -> dict[str, Any]:
    """What the file does not say is the same in every Gemma 3 (arXiv 2503.19786, section 2)."""
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
        "head_dim": facts["gemma3.attention.key_length"], "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": facts["gemma3.attention.key_length"], "sliding_window_pattern": 6,
        "sliding_window": facts["gemma3.attention.sliding_window"], "rope_local_base_freq": 10000.0,
    }


# What config.json says beside the sizes, by GGUF's name of the architecture.
CONFIGS: dict[str, Callable[[Facts], dict[str, Any]]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma3": _gemma3,
}


def model_folder(file: Path) -> Path:
    """The folder that stands for a GGUF file, made where it is not there yet. Raises ModelError for other files."""
    file = file.resolve()
    status = file.stat()
    identity = f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n{Path(__file__).stat().st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "gguf"
    folder = cache / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    facts, tensors = gguf.read_file(file)
    try:
        files = _files(facts, tensors)
    except KeyError as error:
        raise ModelError(f"{file.name} lacks the fact {error.args[0]!r}") from error
    files[POINTER] = json.dumps({"gguf": str(file)})
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=cache) as scratch:
        made = Path(scratch) / "folder"
        made.mkdir()
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
        if not folder.is_dir():
            made.rename(folder)
    return folder


def pointed_file(folder: Path) -> Path | None:
    """The GGUF file that has the weights of a folder, if one does."""
    pointer = folder / POINTER
    return Path(json.loads(pointer.read_text())["gguf"]) if pointer.is_file() else None


def _files(facts: Facts, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Texts of the folder's files."""
    found = {"config.json": json.dumps(_config(facts, tensors), indent=1)}
    if facts.get("tokenizer.ggml.model") == "gpt2" and facts.get("tokenizer.ggml.pre") in SPLITS:
        found["tokenizer.json"] = _tokenizer(facts).to_str()
    if "tokenizer.ggml.tokens" in facts:
        found["tokenizer_config.json"] = json.dumps(_tokenizer_config(facts), ensure_ascii=False)
    return found


def _config(facts: Facts, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    architecture = facts.get("general.architecture")
    if architecture not in CONFIGS:
        raise UnsupportedModelError(
            f"GGUF files of architecture {architecture!r} are not served by themselves; supported are "
            f"{', '.join(CONFIGS)}. Put the file into a folder beside its config.json and tokenizer.json"
        )
    if "rope_freqs.weight" in tensors:
        raise UnsupportedModelError(
            "the GGUF file scales its rope by a tensor, rope_freqs.weight; put the file into a folder beside its "
            "config.json, which says how"
        )
    if (scaling := facts.get(f"{architecture}.rope.scaling.type", "none")) != "none":
        raise UnsupportedModelError(
            f"rope.scaling.type {scaling!r} of a GGUF file is not read; put the file "
            "into a folder beside its config.json"
        )

    def fact(name: str) -> Any:
        return facts[f"{architecture}.{name}"]

    config = {
        **CONFIGS[architecture](facts),
        "hidden_size": fact("embedding_length"), "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"), "num_attention_heads": fact("attention.head_count"),
        "num_key_value_heads": fact("attention.head_count_kv"), "max_position_embeddings": fact("context_length"),
        # Stored as float32: 9.99999975e-06 is the shortest decimal's 1e-05.
        "rms_norm_eps": float(str(np.float32(fact("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(facts.get(f"{architecture}.rope.freq_base", 10000.0)),
        "vocab_size": tensors["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }
    for name, of_facts in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")):
        if f"tokenizer.ggml.{of_facts}" in facts:
            config[name] = int(facts[f"tokenizer.ggml.{of_facts}"])
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in config.items()}


def _special_tokens(facts: Facts) -> list[tuple[int, str]]:
    kinds = facts["tokenizer.ggml.token_type"]
    return [(i, token) for i, token in enumerate(facts["tokenizer.ggml.tokens"]) if kinds[i] == CONTROL]


def _tokenizer_config(facts: Facts) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in _special_tokens(facts)},
    }
    for name, fact in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if f"tokenizer.ggml.{fact}_token_id" in facts:
            content[name] = tokens[int(facts[f"tokenizer.ggml.{fact}_token_id"])]
    if "tokenizer.chat_template" in facts:
        content["chat_template"] = facts["tokenizer.chat_template"]
    return content


def _tokenizer(facts: Facts) -> Tokenizer:
    """Byte-level BPE."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, pre = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.pre"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe"
    ))
    pattern, bytes_ = SPLITS[pre], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[pre] is None)
    first = pre_tokenizers.Digits(individual_digits=True) if pattern is None else pre_tokenizers.Split(
        Regex(pattern), "isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = facts["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for _, token in _special_tokens(facts)]
    )
    tokenizer.add_tokens([
        AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED
    ])
    if facts.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        begin = tokens[int(facts["tokenizer.ggml.bos_token_id"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, int(facts["tokenizer.ggml.bos_token_id"]))],
        )
    return tokenizer
