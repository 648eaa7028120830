"""Quantised checkpoints of a small model by tools of others, each beside what its tool itself makes of it.

    python scripts/make_quantized_checkpoints.py MODEL OUT [--only gptq awq-asym]

OUT/NAME is a checkpoint, OUT/NAME-plain the same model with every matrix dequantised by the tool, to be served as any
other. `check_quantized_checkpoints.py OUT` compares what jaxserve reads with that. Needs an environment of its own with
torch and the tool of the checkpoints that are asked for (all run on a CPU: half a minute a checkpoint of 135M
parameters, ten for GPTQModel); jaxserve never needs one. Tools that want different versions of each other go into
environments of their own, with --only; without, those that are not installed are passed over and named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantizing_tools import by_auto_round, by_bits_and_bytes, by_gptqmodel, by_llm_compressor
from squeezellm_layout import by_k_means

Tool = Callable[..., None]      # (model, folder, folder of the plain twin, **settings)
KV_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
ALL_LINEAR = {"targets": "Linear"}
# Its own W8A16 has groups of 128, which 576 inputs are no multiple of.
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
# Name -> who makes it, and its arguments. Rounding to nearest where a tool does that: formats are looked at, not how
# well a model does in them.
CHECKPOINTS: dict[str, tuple[Tool, Mapping[str, Any]]] = {
    "gptq": (by_auto_round, {"form": "auto_gptq", "bits": 4, "group_size": 64, "sym": True}),
    "gptq-asym": (by_auto_round, {"form": "auto_gptq", "bits": 4, "group_size": 64, "sym": False}),
    "gptq-w2": (by_auto_round, {"form": "auto_gptq", "bits": 2, "group_size": 32, "sym": False}),
    "gptq-w3": (by_auto_round, {"form": "auto_gptq", "bits": 3, "group_size": 32, "sym": True}),
    "gptq-w8": (by_auto_round, {"form": "auto_gptq", "bits": 8, "group_size": 64, "sym": True}),
    "gptq-channel": (by_auto_round, {"form": "auto_gptq", "bits": 4, "group_size": -1, "sym": True}),
    "awq-asym": (by_auto_round, {"form": "auto_awq", "bits": 4, "group_size": 64, "sym": False}),
    "awq-sym": (by_auto_round, {"form": "auto_awq", "bits": 4, "group_size": 64, "sym": True}),
    "w4a16": (by_auto_round, {"form": "llm_compressor", "scheme": "W4A16", "group_size": 64}),
    "w8a8": (by_auto_round, {"form": "llm_compressor", "scheme": "INT8"}),
    "fp8-block": (by_auto_round, {"form": "llm_compressor", "scheme": "FP8_BLOCK"}),
    "llmc-w8a8": (by_llm_compressor, {**ALL_LINEAR, "scheme": "W8A8"}),
    "llmc-w8a16": (by_llm_compressor, {"config_groups": {"group_0": {"targets": ["Linear"], "weights": EIGHT_BITS}}}),
    "llmc-fp8": (by_llm_compressor, {**ALL_LINEAR, "scheme": "FP8_DYNAMIC"}),
    "llmc-fp8-static": (by_llm_compressor, {**ALL_LINEAR, "scheme": "FP8", "is_calibrated": True}),
    "llmc-fp8-kv": (
        by_llm_compressor, {**ALL_LINEAR, "scheme": "FP8", "kv_cache_scheme": KV_FP8, "is_calibrated": True}
    ),
    "gptqmodel-desc_act": (by_gptqmodel, {"bits": 4, "group_size": 32, "sym": True, "desc_act": True}),
    "gptqmodel-v2": (by_gptqmodel, {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"}),
    "bnb-nf4": (by_bits_and_bytes, {"quant_type": "nf4", "compress_statistics": False}),
    "bnb-nf4-nested": (by_bits_and_bytes, {"quant_type": "nf4", "compress_statistics": True}),
    "bnb-fp4-nested": (by_bits_and_bytes, {"quant_type": "fp4", "compress_statistics": True}),
    "bnb-int8": (by_bits_and_bytes, {}),
    "squeezellm": (by_k_means, {"bits": 4}),
    "squeezellm-3bit-sparse": (by_k_means, {"bits": 3, "share_of_outliers": 0.0045}),
}
PACKAGES = {
    by_auto_round: "auto_round", by_llm_compressor: "llmcompressor", by_gptqmodel: "gptqmodel",
    by_bits_and_bytes: "bitsandbytes", by_k_means: "torch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantise a model by the tools of others.")
    parser.add_argument("model", type=Path, help="folder of an unquantised model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(CHECKPOINTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or CHECKPOINTS:
        tool, settings = CHECKPOINTS[name]
        if not arguments.only and find_spec(PACKAGES[tool]) is None:
            print(f"not made, {PACKAGES[tool]} is not installed: {name}", flush=True)
            continue
        tool(arguments.model, arguments.out / name, arguments.out / f"{name}-plain", **settings)
        print(f"made {arguments.out / name}", flush=True)


if __name__ == "__main__":
    main()
