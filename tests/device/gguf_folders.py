"""Folders with a tiny model in a GGUF file, and with the plain weights that the gguf package says the file holds.

The package packs what it can; blocks that it only unpacks (K and IQ4_NL) are drawn: any bits, scales of a fit size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from jaxserve.quantization.formats.gguf import KINDS as BLOCKS
from jaxserve.weights.safetensors import write_file
from tests.device import packed_folders
from tests.device.packed_folders import CONFIG, HEAD_DIM, HEADS, KV_HEADS, LAYERS, MATRICES, VOCAB, WIDTH

KINDS = {f"gguf-{kind.name}": Type(number) for number, kind in BLOCKS.items()}
DRAWN = {Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL}
SUPER = 256     # elements of a block of the K kinds; matrices of such a model are four times as long and wide
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_quantised(kind: str, folder: Path) -> tuple[Path, Path]:
    """A quantised checkpoint and the plain one, of a kind of `packed_folders` or of GGUF."""
    return write_folders(folder, KINDS[kind]) if kind in KINDS else packed_folders.write_folders(kind, folder)


def as_converted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter leaves them: row r of a head's first half, then row r of its second."""
    rows, head_dim = [], len(weight) // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            rows += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return weight[rows]


def blocks_of(values: np.ndarray, kind: Type, rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks, as bytes: of these values, or of others about as large."""
    if kind not in DRAWN:
        return gguf.quantize(values, kind)
    block, size = BLOCKS[kind.value], len(values) * values.shape[1]
    raw = rng.integers(0, 256, (len(values), size // block.size * block.dtype.itemsize // len(values)))
    found = raw.astype(np.uint8).view(block.dtype)
    scale = rng.uniform(0.5, 1, found["d"].shape)

    def set_scales(unit: float) -> None:
        found["d"] = scale * unit
        if "dmin" in block.dtype.names:     # about half of the weights are below 0
            found["dmin"] = scale * unit * ((1 << int(kind.name[1])) - 1) / 2

    set_scales(0.01)
    set_scales(0.01 * float(values.std() / gguf.dequantize(found.view(np.uint8), kind).std()))
    return found.view(np.uint8)


def write_folders(
    folder: Path, kind: Type | None, last: Type | None = None, others: Mapping[str, Type] | None = None
) -> tuple[Path, Path]:
    """One with a GGUF file, one with safetensors of what the gguf package says that the file holds.

    Args:
      last: how the last layer is packed, where it is otherwise.
      others: how some matrices of every layer are packed, by GGUF's names.
    """
    times = 4 if kind is not None and BLOCKS[kind.value].size == SUPER else 1
    rng, plain = np.random.default_rng(3), {}
    into, beside = folder / "gguf", folder / "plain"
    config: dict[str, Any] = {**CONFIG, "torch_dtype": "float32"}
    config |= {name: times * config[name] for name in ("hidden_size", "head_dim", "intermediate_size")}
    for path in (into, beside):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
    writer = gguf.GGUFWriter(into / "tiny.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)

    def add(name: str, stored: str, values: np.ndarray, heads: int | None = None) -> None:
        used = last if last is not None and f".{LAYERS - 1}." in stored else kind
        used = (others or {}).get(stored.split(".")[-2], used)
        is_plain = used is None or values.ndim == 1 or not stored.startswith("blk")
        rows = values if is_plain else blocks_of(values, used, rng)
        plain[name] = values if is_plain else gguf.dequantize(rows, used)
        writer.add_tensor(
            stored, rows if heads is None else as_converted(rows, heads), raw_dtype=None if is_plain else used
        )

    width = times * WIDTH
    add("model.embed_tokens.weight", "token_embd.weight", rng.normal(size=(VOCAB, width)).astype(np.float32))
    add("model.norm.weight", "output_norm.weight", np.ones(width, np.float32))
    for layer in range(LAYERS):
        for norm, stored in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            values = rng.uniform(0.5, 1.5, width).astype(np.float32)
            add(f"model.layers.{layer}.{norm}.weight", f"blk.{layer}.{stored}.weight", values)
        for part, (outs, ins) in MATRICES.items():
            values = rng.normal(size=(times * outs, times * ins)).astype(np.float32) / (8 * times**0.5)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            add(f"model.layers.{layer}.{part}.weight", f"blk.{layer}.{NAMES[part]}.weight", values, heads)
    writer.add_tensor("rope_freqs.weight", np.ones(times * HEAD_DIM // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_file(beside / "model.safetensors", plain)
    return into, beside
