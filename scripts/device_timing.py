"""Times of an op on the device alone, what they are held against, and parts of a run in processes of their own.

An op is called several times inside one program, each call's output the next one's queries: no host between them.
Knows neither models nor servers: jax, numpy and the standard library. Invariant: a part that hangs, dies or says
nothing becomes an error in the report, never the end of the run.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

REPEATS = 5
ERROR_CHARACTERS = 600      # of what a part said last


def chained_ms(op: Callable[..., Array], arrays: tuple[Any, ...], calls: int) -> float:
    """Milliseconds of one call, median of REPEATS programs of `calls`; outputs are shaped like the first array, or
    have fewer columns (a latent cache's values), which then take the place of its first."""
    @jax.jit
    def many(first: Array, rest: tuple[Any, ...]) -> Array:
        return lax.fori_loop(0, calls, lambda _, x: _over(x, op(x, *rest)), first)

    return median_s(lambda: many(arrays[0], arrays[1:])) * 1e3 / calls


def _over(x: Array, out: Array) -> Array:
    out = out.astype(x.dtype)
    return out if out.shape == x.shape else jnp.concatenate([out, x[..., out.shape[-1] :]], -1)


def median_s(run: Callable[[], Any]) -> float:
    """Seconds, median of REPEATS after a first."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return median(times)


def copy_gb_s(size: int, calls: int = 8) -> float:
    """Bytes read and written a second by a kernel that copies `size` bytes: what memory gives at best."""
    @jax.jit
    def many(x: Array) -> Array:
        return lax.fori_loop(0, calls, lambda _, y: y + 1, x)

    x = jnp.zeros(size // 4, jnp.int32)
    return 2 * size * calls / median_s(lambda: many(x)) / 1e9


def matmul_tflop_s(side: int, dtype: str = "bfloat16", calls: int = 4) -> float:
    """Of square matrices."""
    @jax.jit
    def many(x: Array) -> Array:
        return lax.fori_loop(0, calls, lambda _, y: (y @ x) * 0.5, x)

    x = jnp.full((side, side), 1 / side, dtype)
    return 2 * side**3 * calls / median_s(lambda: many(x)) / 1e12


def evidence() -> dict[str, str]:
    """Of what machine and versions the figures of this process are."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "device": jax.devices()[0].device_kind,
        "python": platform.python_version(), "jax": jax.__version__,
    }
    for name in ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
    except OSError:
        said = ""
    if said.strip():
        found["driver, clock, power"] = said.splitlines()[0].strip()
    return found


def in_process(command: list[str], *, timeout_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a part printed as its last line, JSON; {"error": why} where it did not."""
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=timeout_s, env=dict(environment),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s:.0f} s"}
    if done.returncode:
        return {"error": f"exit {done.returncode}: {done.stderr.strip()[-ERROR_CHARACTERS:]}"}
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"printed no result: {done.stdout.strip()[-ERROR_CHARACTERS:]!r}"}
    return found if isinstance(found, dict) else {"error": f"printed no object: {found!r}"}
