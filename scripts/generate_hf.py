#!/usr/bin/env python3
"""Tokens a second by transformers in PyTorch on the same GPU and shapes as `gpu_life.py`: what to compare with.

    python scripts/generate_hf.py --model FOLDER_WITH_CONFIG

Needs torch and transformers, which jaxserve does not. Weights are random, in bfloat16; greedy, all rows of one length.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with config.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="that each prompt gives")
    options = parser.parse_args()
    config = transformers.AutoConfig.from_pretrained(options.model)
    with torch.device(options.device):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rates = {}
    for rows in options.rows:
        ids = torch.randint(0, config.vocab_size, (rows, options.prompt), device=options.device)
        for _ in range(2):      # the first warms up
            if options.device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            made = network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=options.tokens,
                max_new_tokens=options.tokens, pad_token_id=0,
            )
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        assert made.shape == (rows, options.prompt + options.tokens), made.shape
        rates[rows] = rows * options.tokens / seconds
        found = {"tokens_s": rates, "torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps(found), flush=True)     # the last has all


if __name__ == "__main__":
    main()
