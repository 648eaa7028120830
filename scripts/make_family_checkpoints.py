"""Makes tests/fixtures/families: a tiny random checkpoint of every family, with transformers' own float32 logits.

Needs `pip install torch transformers`; run it only to make fixtures anew:
    python scripts/make_family_checkpoints.py tests/fixtures/families [--only gemma2 ...]
Weights are rounded to bfloat16 and stored so; the reference is computed in float32 from the rounded values. Seeds are
searched until every greedy margin is clear. A folder holds config.json as transformers 5 writes it, config.v4.json
where transformers 4 wrote another, model.safetensors, reference.json (prompts, greedy tokens, margins) and
reference.safetensors (logits of every position of prompt and continuation).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from record_reference import load, record
from safetensors.torch import load_file, save_file
from tiny_families import SIZES, TINY, VOCAB, Tiny, version_4_config

MARGIN_MIN = 0.01
GREEDY_TOKENS = 16
PROMPT_LENGTHS = (5, 45)
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*TINY, "gemma3-vision", "gpt-oss-mxfp4"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)     # for models this small, threads only wait for each other
    transformers.logging.set_verbosity_error()
    wanted = arguments.only or [*TINY, "gemma3-vision", "gpt-oss-mxfp4"]
    for name in wanted:
        folder = arguments.output / name
        if name == "gemma3-vision":
            make_vision(arguments.output / "gemma3", folder)
        elif name == "gpt-oss-mxfp4":
            make(TINY["gpt-oss"], folder, round_experts)
            pack_experts(folder)
        else:
            make(TINY[name], folder)
        print(f"{name}: {sum(path.stat().st_size for path in folder.iterdir())} bytes", flush=True)


def make(tiny: Tiny, folder: Path, alter: Any = lambda model: None) -> None:
    """One folder; tries seeds until all greedy margins are clear."""
    config_class = getattr(transformers, tiny.config or tiny.model.removesuffix("ForCausalLM") + "Config")
    fields = {name: value for name, value in (SIZES | tiny.fields).items() if not (value is None and name in SIZES)}
    for seed in range(1000):
        torch.manual_seed(seed)
        model = getattr(transformers, tiny.model)(config_class(**fields))
        randomise(model, 0.0 if tiny.around_zero else 1.0)
        alter(model)
        shutil.rmtree(folder, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        model = load(folder)     # with the values as rounded on disk
        prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in PROMPT_LENGTHS]
        cases = [record(model, prompt, GREEDY_TOKENS) for prompt in prompts]
        if all(min(case["margins"]) >= MARGIN_MIN and len(set(case["token_ids"])) > 4 for case in cases):
            break
    else:
        raise SystemExit(f"{folder.name}: no seed gives margins of {MARGIN_MIN}")
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "reference.json").write_text(json.dumps({"seed": seed, "dtype": "float32", "cases": cases}) + "\n")
    with torch.inference_mode():
        save_file({
            f"logits_{i}": model(
                torch.tensor([case["prompt_token_ids"] + case["token_ids"]]), use_cache=False
            ).logits[0].clone()
            for i, case in enumerate(cases)
        }, folder / "reference.safetensors")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.v4.json").write_text(json.dumps(version_4_config(content, tiny), indent=2) + "\n")


def randomise(model: Any, norm: float) -> None:
    """Values that make every parameter matter: default initialisation has zero biases, unit norms, flat logits."""
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    for name, parameter in (*model.named_parameters(), *buffers):
        is_norm = name.endswith("weight") and parameter.ndim == 1
        if is_norm:
            torch.nn.init.normal_(parameter, norm, 0.2)
        elif parameter.ndim == 1 or name.endswith("_bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        else:
            # Gemma multiplies its embedding by sqrt(D), and it is tied: left as large, each token would repeat itself.
            size = 0.5 if norm == 0 and "embed_tokens" in name else 1.5
            torch.nn.init.normal_(parameter, 0.0, size * parameter.shape[-1] ** -0.5)


def make_vision(text: Path, folder: Path) -> None:
    """The text model inside one that also sees: other names, another config, tensors that text does not need."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    content = json.loads((text / "config.json").read_text())
    content.pop("architectures")
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": content["dtype"],
        "text_config": content, "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16},
        "mm_tokens_per_image": 4, "boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {f"language_model.{name}": data for name, data in load_file(text / "model.safetensors").items()}
    weights["vision_tower.vision_model.embeddings.patch_embedding.bias"] = torch.ones(16)
    weights["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(16)
    save_file(weights, folder / "model.safetensors")
    for name in ("reference.json", "reference.safetensors"):
        shutil.copy(text / name, folder / name)


def round_experts(model: Any) -> None:
    """Expert weights become what MXFP4 can hold; a block's scale is the power of two that holds its largest."""
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(layer.mlp.experts, name)
            parameter.data = dequantised(*quantised(parameter.data))


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, in, out] to codes [E, out, in / 32, 32] and exponents [E, out, in / 32]."""
    blocks = weight.transpose(1, 2).unflatten(-1, (-1, 32)).float()
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=1e-9))) - 2
    codes = (blocks[..., None] / 2 ** exponent[..., None, None] - FP4).abs().argmin(-1)
    return codes.to(torch.uint8), exponent


def dequantised(codes: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    return (FP4[codes.long()] * 2 ** exponent[..., None]).flatten(-2).transpose(1, 2).contiguous()


def pack_experts(folder: Path) -> None:
    """Blocks of 16 bytes and scales in place of the experts' matrices, as gpt-oss is published."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        codes, exponent = quantised(weights.pop(name).float())
        weights[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        weights[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    save_file(weights, folder / "model.safetensors")
    for path in (folder / "config.json", folder / "config.v4.json"):
        content = json.loads(path.read_text())
        content["quantization_config"] = {
            "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
