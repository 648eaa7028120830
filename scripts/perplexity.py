#!/usr/bin/env python3
"""Perplexity of a model on fixed text, by the engine's own prompt logprobs: what a quantisation or a type costs.

    python scripts/perplexity.py --model FOLDER                                  # as it is
    python scripts/perplexity.py --model FOLDER --quantization int8 --baseline   # and without, in one run

The text is the language reference that every CPython brings along (`pydoc_data.topics`), or any file. It is cut into
windows of equal length, each scored alone, so the figure depends on --window and --tokens: compare like with like.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams


def main() -> None:
    options = _options()
    text = Path(options.text).read_text(encoding="utf-8") if options.text else python_topics()
    runs = [options.quantization, None] if options.baseline and options.quantization else [options.quantization]
    figures = [measure(options, text, quantization) for quantization in runs]
    if len(figures) == 2:
        figures[0]["ratio_to_baseline"] = figures[0]["perplexity"] / figures[1]["perplexity"]
    for figure in figures:
        print(json.dumps(figure))


def python_topics() -> str:
    """Some 700 kB of English about Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def measure(options: argparse.Namespace, text: str, quantization: str | None) -> dict[str, Any]:
    """Perplexity over the first `--tokens` tokens, and how long that took."""
    llm = LLM(
        options.model, dtype=options.dtype, quantization=quantization, max_model_len=options.window + 1,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes, kv_cache_dtype=options.kv_cache_dtype,
        enable_prefix_caching=False,
    )
    try:
        tokens = llm.get_tokenizer().encode(text)[: options.tokens]
        windows = [tokens[start : start + options.window] for start in range(0, len(tokens), options.window)]
        windows = [window for window in windows if len(window) > 1]
        began = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": window} for window in windows],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        )
        seconds = time.perf_counter() - began
    finally:
        llm.close()
    loss, count = 0.0, 0
    for window, output in zip(windows, outputs, strict=True):
        for token, scored in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            loss -= scored[token].logprob
            count += 1
    return {
        "model": Path(options.model).name, "dtype": options.dtype, "quantization": quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "perplexity": math.exp(loss / count), "tokens": count, "window": options.window, "seconds": round(seconds, 1),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--baseline", action="store_true", help="also without --quantization, and the ratio")
    parser.add_argument("--text", help="a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--kv-cache-memory-bytes", default="256M")
    parser.add_argument("--kv-cache-dtype", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
