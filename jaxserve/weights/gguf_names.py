"""GGUF files as the checkpoints that they were made of: Hugging Face's names, and values as converters found them.

Converters to GGUF reorder the rows of Llama's query and key heads, so that pairs that rotate together are neighbours,
and store Gemma's norms as they are multiplied, one more than the checkpoint has. Both are undone here, in packed form.
Configuration and tokenizer are those of the folder (config.json, tokenizer.json); a file's facts only say what it is.
Invariant: every tensor of a file has a name in the checkpoint, or WeightsError names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.core.errors import UnsupportedModelError, WeightsError
from jaxserve.quantization.formats.gguf import BY_DTYPE
from jaxserve.weights.files import StoredTensor
from jaxserve.weights.gguf import read_file

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYERS = {
    "llama": LAYER, "qwen2": LAYER, "qwen3": LAYER, "gemma": LAYER, "gemma2": GEMMA_LAYER, "gemma3": GEMMA_LAYER,
}
# What config.json says too: the factors of Llama 3's rope.
SKIPPED = frozenset({"rope_freqs.weight"})


def read_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by their names in a checkpoint; packed ones are called `blocks`."""
    facts, tensors = read_file(path)
    architecture = facts.get("general.architecture")
    if architecture not in LAYERS:
        raise UnsupportedModelError(
            f"{path.name} holds the architecture {architecture!r}; of GGUF files, {', '.join(LAYERS)} are read"
        )
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        if stored in SKIPPED:
            continue
        name, kind = _name(stored, LAYERS[architecture], path.name)
        data = _restored(tensor.data, kind, architecture, facts, f"{path.name}: tensor {stored!r}")
        if data.dtype in BY_DTYPE:
            name = name.removesuffix("weight") + "blocks"
        found[name] = replace(tensor, name=name, data=data)
    return found


def _name(stored: str, layer: Mapping[str, str], where: str) -> tuple[str, str]:
    """blk.3.attn_q.weight -> (model.layers.3.self_attn.q_proj.weight, attn_q)"""
    match stored.split("."):
        case ["blk", index, kind, ("weight" | "bias") as suffix] if index.isdecimal() and kind in layer:
            return f"model.layers.{index}.{layer[kind]}.{suffix}", kind
        case [kind, ("weight" | "bias") as suffix] if kind in MODEL:
            return f"{MODEL[kind]}.{suffix}", kind
    raise WeightsError(f"{where}: tensor {stored[:120]!r} is none that this architecture's checkpoints have")


def _restored(
    data: np.ndarray[Any, Any], kind: str, architecture: str, facts: Mapping[str, Any], said: str
) -> np.ndarray[Any, Any]:
    """The values that the converter found."""
    if architecture.startswith("gemma") and kind.endswith("norm"):
        if data.dtype in BY_DTYPE:
            raise WeightsError(f"{said} is a norm in blocks; norms are read as floats only")
        return data - np.ones((), data.dtype)
    names = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    if architecture != "llama" or kind not in names:
        return data
    heads = facts.get(names[kind], facts.get(names["attn_q"]))
    rows = data.shape[0] if data.ndim else 0
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise WeightsError(f"{said} has {rows} rows; {names[kind]} is {heads!r}, which does not divide them into pairs")
    # Rows 2i and 2i + 1 of a head rotate together in the file, i and i + half in the checkpoint.
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return data[order]
