"""How tools of others are called, each to leave a quantised checkpoint and its dequantised twin.

Every function takes the model's folder, the two folders to write and the tool's own settings. Knows nothing of how
jaxserve reads what they write: twins are made by the tools. Imports a tool only where it is used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 16, 256
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)


def by_auto_round(model: Path, folder: Path, plain: Path, *, form: str, **settings: Any) -> None:
    """Its format "fake" is the model with every weight replaced by what its codes stand for."""
    from auto_round import AutoRound

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tool = AutoRound(str(model), iters=0, disable_opt_rtn=True, **settings)
        tool.quantize_and_save(output_dir=scratch, format=f"{form},fake")
        for made in sorted(Path(scratch).rglob("config.json")):
            target = plain if made.parent.name == "fake" else folder
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(made.parent, target)
    config = json.loads((plain / "config.json").read_text())
    if config.pop("quantization_config", None):     # of schemes that round rows: transformers would ask for the tool
        (plain / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def by_llm_compressor(
    model: Path, folder: Path, plain: Path, *, is_calibrated: bool = False, **settings: Any
) -> None:
    """Rounding to nearest; static scales come from some text. The twin is what compressed-tensors decompresses."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    more: dict[str, Any] = {}
    if is_calibrated:
        from datasets import Dataset

        rows = [row.tolist() for row in calibration(AutoTokenizer.from_pretrained(model))]
        more = {
            "dataset": Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
            "num_calibration_samples": len(rows), "max_seq_length": CALIBRATION_TOKENS,
        }
    oneshot(model=network, recipe=QuantizationModifier(ignore=["lm_head"], **settings), **more)
    network.save_pretrained(folder, save_compressed=True)
    copy_beside(model, folder)
    opened = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    write_plain(model, plain, {
        name: value.float() for name, value in opened.state_dict().items() if name.endswith("proj.weight")
    })


def by_gptqmodel(model: Path, folder: Path, plain: Path, **settings: Any) -> None:
    """GPTQ itself, with a Hessian of some text; the twin is the weights of its own torch kernel.

    GPTQModel 7.7 does not start on less than three cores without GPTQMODEL_CPU_WORKERS=2 in the environment.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)}
            for row in calibration(AutoTokenizer.from_pretrained(model))]
    tool = GPTQModel.load(str(model), QuantizeConfig(**settings))
    tool.quantize(rows, batch_size=1)
    tool.save(str(folder))
    copy_beside(model, folder)
    opened = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    write_plain(model, plain, {
        f"{name}.weight": module.dequantize_weight().T.float() for name, module in opened.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }, others=folder)


def by_bits_and_bytes(model: Path, folder: Path, plain: Path, **settings: Any) -> None:
    """Its functions on every projection, named as transformers saves them; without settings LLM.int8."""
    import torch
    from bitsandbytes import functional
    from safetensors.torch import load_file

    stored: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, weight in load_file(model / "model.safetensors").items():
        if not key.endswith("proj.weight"):
            stored[key] = weight
        elif settings:
            stored[key], state = functional.quantize_4bit(weight.float(), blocksize=64, **settings)
            stored |= {f"{key}.{part}": data for part, data in state.as_dict(packed=True).items()}
            values[key] = functional.dequantize_4bit(stored[key], state)
        else:
            stored[key], scale, _ = functional.int8_vectorwise_quant(weight.half())
            stored[key.removesuffix("weight") + "SCB"] = scale
            stored[key.removesuffix("weight") + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
            values[key] = functional.int8_vectorwise_dequant(stored[key], scale)
    write_folder(model, folder, stored, {
        "quant_method": "bitsandbytes", "load_in_4bit": bool(settings), "load_in_8bit": not settings,
        "bnb_4bit_quant_type": settings.get("quant_type", "nf4"),
        "bnb_4bit_use_double_quant": settings.get("compress_statistics", False),
    })
    write_plain(model, plain, values)


def calibration(tokenizer: Any) -> Any:
    """Windows [n, tokens] of the end of the text whose beginning `perplexity.py` scores."""
    from pydoc_data.topics import topics

    import torch

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[-CALIBRATION_WINDOWS * CALIBRATION_TOKENS :]).reshape(CALIBRATION_WINDOWS, -1)


def write_plain(model: Path, folder: Path, values: Mapping[str, Any], *, others: Path | None = None) -> None:
    """The model with these weights in the place of its own; its other tensors as a checkpoint `others` has them."""
    from safetensors.torch import load_file

    stored = load_file(model / "model.safetensors")
    if missing := values.keys() - stored.keys():
        raise ValueError(f"the tool dequantised {sorted(missing)[:3]}, which the model does not have")
    kept = stored if others is None else load_file(others / "model.safetensors")
    write_folder(model, folder, {**{name: kept[name] for name in stored if name not in values}, **values}, None)


def write_folder(model: Path, folder: Path, tensors: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
    """A checkpoint of these tensors with the model's config and tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    copy_beside(model, folder)
    config = json.loads((model / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def copy_beside(model: Path, folder: Path) -> None:
    """Tokenizer and the like."""
    for file in BESIDE:
        if (model / file).exists():
            shutil.copy(model / file, folder)
