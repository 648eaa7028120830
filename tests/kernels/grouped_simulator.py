"""The experts' product for Hopper in jax's simulator, with races looked for; a process of its own.

    python -m tests.kernels.grouped_simulator uneven

Weights of groups without rows hold NaN. Prints one line of JSON: the largest error beside the reference, whether every
element is finite, whether any race was found.
"""

from __future__ import annotations

import json
import sys
import types
import warnings

import jax.numpy as jnp
import numpy as np

from tests.kernels.simulator import races_found

# Rows of each group, rows past them, columns out, shared width, rows of a tile.
CASES = {
    "uneven": ((3, 0, 70, 1), 5, 128, 192, 64),
    "one-group": ((130,), 0, 256, 128, 128),
    "narrow": ((1, 0, 2), 0, 192, 64, 64),
    "none": ((0, 0), 4, 128, 64, 64),
    "bug": ((3, 0, 70, 1), 5, 128, 384, 64),     # planted: the loader overwrites what is being read
}


def run(name: str) -> dict[str, float | bool]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.grouped_matmul import mosaic_gpu, reference

    counts, spare, width_out, width, rows = CASES[name]
    if name == "bug":
        known = mosaic_gpu.plgpu
        broken = types.SimpleNamespace(**{item: getattr(known, item) for item in dir(known)})
        broken.barrier_wait = lambda *_: None
        mosaic_gpu.plgpu = broken
    rng = np.random.default_rng(0)
    x_TI = jnp.asarray(rng.normal(size=(sum(counts) + spare, width)), jnp.bfloat16)
    weight_EOI = jnp.asarray(rng.normal(size=(len(counts), width_out, width)), jnp.bfloat16)
    count_E = jnp.asarray(counts, jnp.int32)
    poisoned_EOI = jnp.where((count_E > 0)[:, None, None], weight_EOI, jnp.nan)
    simulated = plgpu.InterpretGPUParams(detect_races=True)
    got = mosaic_gpu.grouped_matmul(x_TI, poisoned_EOI, count_E, rows=rows, programs=2, interpret=simulated)
    expected = reference.grouped_matmul(x_TI, weight_EOI, count_E)
    own = slice(0, sum(counts))
    error = np.abs(np.asarray(got)[own] - np.asarray(expected)[own])
    return {
        "error": float(np.nan_to_num(error).max(initial=0)), "finite": bool(np.isfinite(error).all()),
        "races": races_found(), "largest": float(np.abs(np.asarray(expected)).max(initial=0)),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    print(json.dumps(run(sys.argv[1])))
