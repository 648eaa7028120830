"""Records what transformers computes in float32, so that tests can compare without torch.

Needs `pip install torch transformers`; run it only to make fixtures anew:
    python scripts/record_reference.py FOLDER tests/fixtures/smollm2_reference.json
For each prompt: its token ids, the greedy tokens that follow (end-of-sequence does not stop them) and each one's
margin, the distance of its logit to the second best. Prompts with a margin too small to be a fair test are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MARGIN_MIN = 1e-3

CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three fruits.",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
]
TEXTS = [
    "Once upon a time",
    "The quick brown fox jumps over the lazy dog. The",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 2, 3, 4, 5,",
    "The history of the Roman Empire begins",
]


@torch.inference_mode()
def record(model: Any, prompt: list[int], count: int) -> dict[str, Any]:
    """Greedy tokens and margins; the whole sequence is computed anew for each, without a cache."""
    ids, margins = list(prompt), []
    for _ in range(count):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        margins.append(round(float(best.values[0] - best.values[1]), 6))
        ids.append(int(best.indices[0]))
    return {"prompt_token_ids": prompt, "token_ids": ids[len(prompt):], "margins": margins}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Record a float32 reference of a model folder with transformers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer, model = AutoTokenizer.from_pretrained(arguments.folder), load(arguments.folder)
    cases = []
    chats = CHATS if tokenizer.chat_template else ()     # a base model has none
    for kind, text in [*(("chat", text) for text in chats), *(("text", text) for text in TEXTS)]:
        if kind == "chat":
            chat = [{"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            prompt = tokenizer(text)["input_ids"]
        case = record(model, prompt, arguments.tokens)
        is_fair = min(case["margins"]) >= MARGIN_MIN
        print(f"{'kept' if is_fair else 'left out'}: smallest margin {min(case['margins']):.5f}: {text!r}")
        if is_fair:
            cases.append({"kind": kind, "prompt": text, **case, "text": tokenizer.decode(case["token_ids"])})
    with open(arguments.folder / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    content = {"model_sha256": digest, "dtype": "float32", "cases": cases}
    arguments.output.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
