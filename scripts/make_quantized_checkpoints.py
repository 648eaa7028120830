"""Quantised checkpoints of a small model by tools of others, each beside what its tool itself makes of it.

    python scripts/make_quantized_checkpoints.py MODEL OUT [--only gptq awq-asym]

OUT/NAME is a checkpoint, OUT/NAME-plain the same weights dequantised by the tool. `check_quantized_checkpoints.py OUT`
compares what jaxserve reads with that. Needs an environment of its own with torch, auto-round, compressed-tensors and
bitsandbytes (all run on a CPU, slowly: a minute or three a checkpoint of 135M parameters); jaxserve never needs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

# auto-round's export formats and arguments. Rounding to nearest: formats are looked at, not how well a model does.
AUTO_ROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": True}),
    "gptq-asym": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": False}),
    "gptq-w2": ("auto_gptq", {"bits": 2, "group_size": 32, "sym": False}),
    "gptq-w3": ("auto_gptq", {"bits": 3, "group_size": 32, "sym": True}),
    "gptq-w8": ("auto_gptq", {"bits": 8, "group_size": 64, "sym": True}),
    "gptq-channel": ("auto_gptq", {"bits": 4, "group_size": -1, "sym": True}),
    "awq-asym": ("auto_awq", {"bits": 4, "group_size": 64, "sym": False}),
    "awq-sym": ("auto_awq", {"bits": 4, "group_size": 64, "sym": True}),
    "w4a16": ("llm_compressor", {"scheme": "W4A16", "group_size": 64}),
    "w8a8": ("llm_compressor", {"scheme": "INT8"}),
    "fp8-block": ("llm_compressor", {"scheme": "FP8_BLOCK"}),
}
BITS_AND_BYTES: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"quant_type": "nf4", "compress_statistics": False},
    "bnb-nf4-nested": {"quant_type": "nf4", "compress_statistics": True},
    "bnb-fp4-nested": {"quant_type": "fp4", "compress_statistics": True},
    "bnb-int8": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantise a model by the tools of others.")
    parser.add_argument("model", type=Path, help="folder of an unquantised model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*AUTO_ROUND, *BITS_AND_BYTES])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or [*AUTO_ROUND, *BITS_AND_BYTES]:
        if name in AUTO_ROUND:
            by_auto_round(arguments.model, arguments.out, name)
        else:
            by_bits_and_bytes(arguments.model, arguments.out, name)
        print(f"made {arguments.out / name}")


def by_auto_round(model: Path, out: Path, name: str) -> None:
    """Its format "fake" is the model with every weight replaced by what its codes stand for."""
    from auto_round import AutoRound

    form, settings = AUTO_ROUND[name]
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tool = AutoRound(str(model), iters=0, disable_opt_rtn=True, **settings)
        tool.quantize_and_save(output_dir=scratch, format=f"{form},fake")
        for made in sorted(Path(scratch).rglob("config.json")):
            target = out / (f"{name}-plain" if made.parent.name == "fake" else name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(made.parent, target)


def by_bits_and_bytes(model: Path, out: Path, name: str) -> None:
    """Its functions on every projection, named as transformers saves them."""
    import torch
    from bitsandbytes import functional
    from safetensors.torch import load_file, save_file

    settings = BITS_AND_BYTES[name]
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for key, weight in load_file(model / "model.safetensors").items():
        if not key.endswith("proj.weight"):
            stored[key] = weight
        elif settings:
            stored[key], state = functional.quantize_4bit(weight.float(), blocksize=64, **settings)
            stored |= {f"{key}.{part}": data for part, data in state.as_dict(packed=True).items()}
            plain[key] = functional.dequantize_4bit(stored[key], state)
        else:
            stored[key], scale, _ = functional.int8_vectorwise_quant(weight.half())
            stored[key.removesuffix("weight") + "SCB"] = scale
            stored[key.removesuffix("weight") + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
            plain[key] = functional.int8_vectorwise_dequant(stored[key], scale)
    folder = out / name
    for target in (folder, out / f"{name}-plain"):
        target.mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (model / file).exists():
            shutil.copy(model / file, folder)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": bool(settings), "load_in_8bit": not settings,
        "bnb_4bit_quant_type": settings.get("quant_type", "nf4"),
        "bnb_4bit_use_double_quant": settings.get("compress_statistics", False),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors")
    save_file({key: value.contiguous() for key, value in plain.items()}, out / f"{name}-plain" / "model.safetensors")


if __name__ == "__main__":
    main()
