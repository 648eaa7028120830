"""Makes tests/fixtures/quantised: a tiny random model as tools of others quantise it, with transformers' logits.

    python scripts/make_quantised_fixtures.py tests/fixtures/quantised [--only gptq …]

Needs the environments of `make_quantized_checkpoints.py`; those whose tool is not installed are passed over and named.
Each folder keeps the tool's config.json and model.safetensors as they were written (but for a path), and
reference.safetensors: a prompt and transformers' float32 logits of the twin that the tool dequantised; where rows are
rounded ("run"), also those of compressed-tensors' own float32 run of the packed checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from make_quantized_checkpoints import ALL_LINEAR, KV_FP8, PACKAGES, Tool
from quantizing_tools import by_auto_round, by_bits_and_bytes, by_gptqmodel, by_llm_compressor
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import CompressedTensorsConfig

VOCAB, PROMPT = 96, 24
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)
FIXTURES: dict[str, tuple[Tool, dict[str, Any]]] = {
    "gptq": (by_auto_round, {"form": "auto_gptq", "bits": 4, "group_size": 32, "sym": True}),
    "awq": (by_auto_round, {"form": "auto_awq", "bits": 4, "group_size": 32, "sym": False}),
    "w4a16": (by_auto_round, {"form": "llm_compressor", "scheme": "W4A16", "group_size": 32}),
    "gptq-desc_act": (by_gptqmodel, {"bits": 4, "group_size": 32, "sym": True, "desc_act": True}),
    "w8a8": (by_llm_compressor, {**ALL_LINEAR, "scheme": "W8A8"}),
    "fp8-static-kv": (
        by_llm_compressor, {**ALL_LINEAR, "scheme": "FP8", "kv_cache_scheme": KV_FP8, "is_calibrated": True}
    ),
    "nf4": (by_bits_and_bytes, {"quant_type": "nf4", "compress_statistics": True}),
    "int8": (by_bits_and_bytes, {}),
}
KEPT = ("config.json", "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quantised fixtures of the tests.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(FIXTURES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model")
        for name in arguments.only or FIXTURES:
            tool, settings = FIXTURES[name]
            if find_spec(PACKAGES[tool]) is None:
                print(f"not made, {PACKAGES[tool]} is not installed: {name}")
                continue
            made, plain = Path(scratch) / name, Path(scratch) / f"{name}-plain"
            tool(model, made, plain, **settings)
            keep(made, plain, arguments.output / name)
            print(f"made {arguments.output / name}")


def write_model(folder: Path) -> Path:
    """Random weights, the same on every run, and a tokenizer, which tools ask for."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).to(torch.float16)
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


@torch.inference_mode()
def keep(made: Path, plain: Path, folder: Path) -> None:
    """What tests need, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(made / name, folder / name)
    prompt = torch.randint(3, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(1))
    of_plain = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    reference = {"prompt": prompt.int(), "plain": of_plain(prompt[None]).logits[0].contiguous()}
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)     # a folder of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    groups = config["quantization_config"].get("config_groups", {}).values()
    if any(group["input_activations"] for group in groups):
        config["quantization_config"]["kv_cache_scheme"] = None     # the cache is another matter
        (made / "config.json").write_text(json.dumps(config))
        run = AutoModelForCausalLM.from_pretrained(
            made, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
        ).eval()
        reference["run"] = run(prompt[None]).logits[0].float().contiguous()
    save_file(reference, folder / "reference.safetensors")


if __name__ == "__main__":
    main()
