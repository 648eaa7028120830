#!/usr/bin/env python3
"""Perplexity by transformers in PyTorch, float32, on the text and windows of `perplexity.py`: what to compare with.

    python scripts/perplexity_hf.py --text FILE FOLDER [FOLDER ...]
    python scripts/perplexity_hf.py --text FILE --activations int8 w8a8-plain
    python scripts/perplexity_hf.py --text FILE --activations fp8 --scales fp8-static fp8-static-plain

Needs torch, which jaxserve does not: run it with a Python that has torch and transformers, on plain checkpoints (a
quantised one's dequantised twin, see `make_quantized_checkpoints.py`). Give both scripts the same --text.

A twin's rows stay as they are. Where the scheme rounds them, --activations does: what enters a linear layer (but the
head) becomes the number that its code stands for, in float32. Scales are each row's own, its largest value over 127
(int8) or 448 (fp8, e4m3), as in vLLM; with --scales the `input_scale`s that the packed checkpoint stores.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

LARGEST = {"int8": 127.0, "fp8": 448.0}
TINY = 1e-30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER")
    parser.add_argument("--text", required=True, help="a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--activations", choices=sorted(LARGEST), help="round what enters linear layers")
    parser.add_argument("--scales", help="folder of the packed checkpoint that stores the scales of --activations")
    options = parser.parse_args()
    if options.scales and not options.activations:
        parser.error("--scales are those of --activations")
    text = Path(options.text).read_text(encoding="utf-8")
    for model in options.models:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        if options.activations:
            round_rows(network, options.activations, stored_scales(options.scales) if options.scales else None)
        figure = measure(model, network, text, options.tokens, options.window)
        print(json.dumps(figure | {"activations": options.activations, "scales": options.scales}), flush=True)


def stored_scales(folder: str) -> dict[str, Tensor]:
    """`input_scale` of every module, by its name."""
    mark = ".input_scale"
    tensors = (pair for path in sorted(Path(folder).glob("*.safetensors")) for pair in load_file(path).items())
    return {name.removesuffix(mark): tensor.float() for name, tensor in tensors if name.endswith(mark)}


def round_rows(network: torch.nn.Module, kind: str, scales: dict[str, Tensor] | None) -> None:
    """Every linear layer but the head meets rounded rows from here on."""
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = None if scales is None else scales[name]
            module.register_forward_pre_hook(partial(rounded, kind=kind, scale=scale))


def rounded(_: torch.nn.Module, arguments: tuple[Tensor, ...], kind: str, scale: Tensor | None) -> Tensor:
    """What the codes of a layer's rows stand for."""
    x, largest = arguments[0], LARGEST[kind]
    if scale is None:
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(TINY)
    if kind == "int8":
        return (x / scale).round().clamp(-largest - 1, largest) * scale
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale


@torch.inference_mode()
def measure(model: str, network: torch.nn.Module, text: str, tokens: int, window: int) -> dict[str, object]:
    """Mean of all windows' losses, each window scored alone."""
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"][:tokens]
    loss, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor(ids[start : start + window])
        logits = network(piece[None]).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    return {
        "model": Path(model).name, "dtype": "float32", "perplexity": math.exp(loss / count), "tokens": count,
        "window": window,
    }


if __name__ == "__main__":
    main()
