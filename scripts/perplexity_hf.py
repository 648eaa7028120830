#!/usr/bin/env python3
"""Perplexity by transformers in PyTorch, float32, on the text and windows of `perplexity.py`: what to compare with.

    python scripts/perplexity_hf.py --text FILE FOLDER [FOLDER ...]

Needs torch, which jaxserve does not: run it with a Python that has torch and transformers, on plain checkpoints (a
quantised one's dequantised twin, see `make_quantized_checkpoints.py`). Give both scripts the same --text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER")
    parser.add_argument("--text", required=True, help="a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    text = Path(options.text).read_text(encoding="utf-8")
    for model in options.models:
        print(json.dumps(measure(model, text, options.tokens, options.window)), flush=True)


@torch.inference_mode()
def measure(model: str, text: str, tokens: int, window: int) -> dict[str, object]:
    """Mean of all windows' losses, each window scored alone."""
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"][:tokens]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
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
