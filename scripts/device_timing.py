"""Times of an op on the device alone, and what they are held against.

An op is called several times inside one program, each call's output the next one's queries: no host between them.
Knows neither models nor servers: jax, numpy and the standard library. Invariant: ceilings are of random numbers (a GPU
multiplies constants faster) and of nothing but the kernel that is named.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

REPEATS = 5
ENOUGH_S = 4.0      # no further repeat after that


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
    """Seconds, median of REPEATS after a first; of fewer where that takes long."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_S:
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return median(times)


def copy_gb_s(size: int, calls: int = 8) -> float:
    """Bytes read and written a second by a kernel that copies `size` bytes: what memory gives at best."""
    step = jax.jit(lambda x: x + 1)      # calls of their own: a loop in one program begins with a copy more
    x = jnp.arange(size // 4, dtype=jnp.int32)
    return 2 * size * calls / median_s(lambda: _chain(step, x, calls)) / 1e9


def matmul_tflop_s(side: int, dtype: str = "bfloat16", calls: int = 8) -> float:
    """Of square matrices."""
    step = jax.jit(lambda y, x: y @ x)
    x = jax.random.normal(jax.random.key(0), (side, side), dtype) * side**-0.5
    return 2 * side**3 * calls / median_s(lambda: _chain(lambda y: step(y, x), x, calls)) / 1e12


def _chain(step: Callable[[Array], Array], x: Array, calls: int) -> Array:
    for _ in range(calls):
        x = step(x)
    return x


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
