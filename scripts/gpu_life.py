#!/usr/bin/env python3
"""One life of the engine as a server leads it, without HTTP or text: start, first token, generation; lines of JSON.

    python scripts/gpu_life.py --model FOLDER --config qwen3b.yaml --load-format dummy --compilation-cache-dir FOLDER

Knows flags and results, no kernel. A second run with the same folder of programs is a warm start; XLA's own cache of
measured choices is a flag of XLA_FLAGS, which the caller sets. Invariant: counts of compilations after the engine said
that it was ready are in the result, and 0 where the engine keeps its word.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxserve.core.progress import NoProgress
from jaxserve.core.request import EngineRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.flags.build import serve_config
from jaxserve.flags.config_file import read_config
from jaxserve.launch import LocalEngine, build_engine


def main() -> None:
    options = _options()
    raw = read_config(options.config) if options.config is not None else {}
    raw |= {"model": options.model, "load-format": options.load_format, "skip-tokenizer-init": True}
    raw |= {name: value for name, value in (flag.split("=", 1) for flag in options.flag)}
    if options.compilation_cache_dir is not None:
        raw["compilation-cache-dir"] = options.compilation_cache_dir
    for found in life(raw, options.rows, options.prompt, options.tokens):
        print(json.dumps(found), flush=True)     # the last has all, the others what there is if no more comes


def life(raw: dict[str, Any], rows: list[int], prompt: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Seconds of each part of the start, of the first token after it, and tokens a second by rows, one by one."""
    config = serve_config(raw).engine
    began = time.perf_counter()
    engine = build_engine(config, progress=NoProgress())
    serving = time.perf_counter()
    try:
        engine.compile_rest()
        engine.runner.wait_ready()
        ready = time.perf_counter()
        first = _generate(engine, 1, prompt, 1)
        stats = engine.runner.compile_stats
        found = {
            "serving_s": serving - began, "ready_s": ready - began, "first_token_s": first,
            **{f"start_{name}_s": seconds for name, seconds in engine.report.seconds.items()},
            "programs": stats.compiled_count + stats.loaded_count, "compiled": stats.compiled_count,
            "page_count": engine.info.page_count, "rows_max": engine.info.row_count,
            "tokens_s": {},
        }
        for count in rows:
            found["tokens_s"][count] = count * tokens / _generate(engine, count, prompt, tokens)
            yield found | {"compiled_after_ready": engine.stats.compiled_after_ready_count} | _memory()
    finally:
        engine.close()


def _generate(engine: LocalEngine, count: int, prompt: int, tokens: int) -> float:
    """Seconds in which `count` prompts of random tokens, none like another, each give `tokens`."""
    rng = np.random.default_rng(time.time_ns())
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    for index in range(count):
        ids = tuple(rng.integers(0, engine.info.vocab_size, prompt).tolist())
        engine.loop.add(EngineRequest(request_id=str(index), prompt_token_ids=ids, params=params))
    made, unfinished = [0] * count, count
    while unfinished:
        for output in engine.step():
            made[int(output.request_id)] += len(output.token_ids)
            if output.finish_reason is not None:
                unfinished -= 1
    seconds = time.perf_counter() - began
    if made != [tokens] * count:
        raise RuntimeError(f"{count} prompts were to give {tokens} tokens each and gave {made}")
    return seconds


def _memory() -> dict[str, Any]:
    """What the allocator was given and has used; CPUs do not say."""
    import os

    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    fraction = os.environ.get("XLA_CLIENT_MEM_FRACTION", os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
    return {
        "device": device.device_kind, "fraction": fraction,
        "limit_gib": stats.get("bytes_limit", 0) / 2**30, "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with config.json, and weights unless they are dummy")
    parser.add_argument("--config", help="a shipped YAML file, by bare name, or a path; its model is --model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--compilation-cache-dir", help="where compiled programs are kept")
    parser.add_argument("--flag", action="append", default=[], metavar="NAME=VALUE", help="of the engine; repeatable")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="that each prompt gives")
    return parser.parse_args()


if __name__ == "__main__":
    main()
