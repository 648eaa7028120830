"""Compiles each length of blocks that a tuner tries, for an H200 that is not there; fails on a spill. Its own process.

    python -m tests.kernels.compile_candidates
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"     # before jax: the plugin is there, its device is not

from kernels_pallas import hopper
from kernels_pallas.shapes import head_shape
from scripts import check_kernels, tune_kernels


def spilled(trial: tune_kernels.Trial) -> int:
    """Bytes, over both kernels of an op."""
    shape = head_shape(tune_kernels.SHAPES[trial.head_dim])
    tokens = check_kernels.DECODE_TOKENS if trial.op == "paged_decode" else check_kernels.PREFILL_TOKENS
    codes = tune_kernels.CODES if trial.is_quantized else None
    arrays, options = check_kernels.attention_arguments(shape, trial.page, tokens, codes)
    kernel = getattr(importlib.import_module(f"kernels_pallas.{trial.op}.mosaic_gpu"), trial.op)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        call = functools.partial(kernel, sink_N=None, blocks=trial.blocks, **options)
        check_kernels.compiled(call, *arrays[:5])
        said = "".join(report.read_text() for report in Path(folder).glob("*.ptxas"))
    sizes = re.findall(r"(\d+) bytes spill stores", said)
    assert sizes, "ptxas said nothing"
    return sum(int(size) for size in sizes)


if __name__ == "__main__":
    bad = 0
    every = tune_kernels.trials(list(tune_kernels.OPS), list(hopper.HEAD_DIMS), [16])
    for one in {(one.op, one.key, one.blocks.context): one for one in every}.values():      # with the most stages
        try:
            found = str(spilled(one))
        except Exception as error:      # each is told, none hides the others
            found = f"{type(error).__name__}: {str(error)[:200]!r}"
        bad += found != "0"
        print(f"{one.name}: {found}", flush=True)
    sys.exit(bad != 0)
