"""One implementation of attention on this device: is it right beside XLA's, and how long does it take?

`python -m jaxserve.runner.trial_step NAME SECONDS` reads layers (JSON of `AttentionLayer`, a list) from stdin, runs
steps of each through `layers.paged.attend`, as a model does, and prints one JSON list of findings as its last line. A
process of its own, for `runner.trial`: what hangs or breaks the device here ends with it, after SECONDS even if nobody
waits.
Invariant: slots that no token may see hold NaN, so an implementation that looks at one is found out.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.core.model_spec import Global, SlidingWindow
from jaxserve.layers import paged
from jaxserve.layers.context import LayerKv, StepContext
from kernels_pallas.quantized import QuantizedPages
from kernels_pallas.storage import storage_dtype
from kernels_pallas.work import AttentionWork, plan_work

BUCKET = 64                  # what token counts are rounded up to, so that a step has padding
TIMED_ROWS, TIMED_CONTEXT = 64, 1024     # rows: or as many as keep keys and values below TIMED_BYTES
TIMED_BYTES = 128 << 20
TIMED_CHUNK = 1024
CALLS = 10                   # of an op between two looks at the clock
LONG_S = 0.05                # of an op that is called once instead
REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionLayer:
    """What attention is asked to do in some layers of a model, on one device.

    Attributes:
      layers: that are alike.
      value_dim: of a latent cache, whose keys are values too; None: values of their own.
      codes: dtype of an 8-bit cache's codes; None: numbers of `dtype`.
    """

    layers: int
    head_count: int
    kv_head_count: int
    head_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    has_sinks: bool
    value_dim: int | None
    page_size: int
    dtype: str
    codes: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One implementation in one kind of layer.

    Attributes:
      error: largest difference from XLA's output, as a share of the largest value; infinite where one is no number.
      ms, xla_ms: of a step of decodes and one of a prompt's chunk together, in one layer.
    """

    error: float
    ms: float
    xla_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """Rows of a step: their old tokens and their new ones; the first `decodes` are decodes."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    decodes: int


def mixed(page_size: int) -> Entries:
    """Decodes of all lengths around pages' edges and beyond, a chunk after some context and a prompt from its start."""
    edges = (0, page_size - 2, page_size - 1, page_size, 2 * page_size - 1)
    starts = (*edges, *np.random.default_rng(0).integers(200, 1500, 19).tolist())
    return Entries(starts=(*starts, 333, 0), counts=(1,) * len(starts) + (200, 90), decodes=len(starts))


def decodes(layer: AttentionLayer) -> Entries:
    """Rows of equal lengths: what they read is what is timed."""
    rows, of_token = TIMED_ROWS, layer.kv_head_count * layer.head_dim * (2 if layer.value_dim is None else 1)
    while rows > 1 and rows * TIMED_CONTEXT * of_token * jnp.dtype(layer.codes or layer.dtype).itemsize > TIMED_BYTES:
        rows //= 2
    return Entries(starts=(TIMED_CONTEXT - 1,) * rows, counts=(1,) * rows, decodes=rows)


CHUNK = Entries(starts=(TIMED_CHUNK,), counts=(TIMED_CHUNK,), decodes=0)


def find(implementation: str, layer: AttentionLayer) -> Finding:
    """Runs a mixed step for its result, then one of decodes and one of a chunk for time.

    Raises NoImplementationError where the implementation does not serve the layer here.
    """
    attend = call_of(layer)
    arrays = arrays_of(layer, mixed(layer.page_size))
    got, expected = (
        np.asarray(jax.jit(partial(attend, implementation=name))(*arrays)[0].astype(jnp.float32))
        for name in (implementation, "xla")
    )
    del arrays
    error = float("inf")
    if np.isfinite(got).all() and np.isfinite(expected).all() and expected.any():
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
    ms = {name: 0.0 for name in (implementation, "xla")}
    for entries in (decodes(layer), CHUNK):
        arrays = arrays_of(layer, entries)
        for name in ms:
            ms[name] += milliseconds(partial(attend, implementation=name, has_prefill=not entries.decodes), arrays)
    return Finding(error=error, ms=ms[implementation], xla_ms=ms["xla"])


def call_of(layer: AttentionLayer) -> Callable[..., tuple[Array, LayerKv]]:
    """`paged.attend` of arrays as `arrays_of` makes them."""
    span = Global() if layer.window is None else SlidingWindow(layer.window)
    sinks = jnp.linspace(-1, 1, layer.head_count, dtype=jnp.float32) if layer.has_sinks else None

    def attend(q: Array, k: Array, v: Array | None, kv: LayerKv, context: StepContext, **options: Any) -> Any:
        return paged.attend(
            q, k, v, kv, context, 0, scale=layer.scale, span=span, soft_cap=layer.soft_cap, sink_N=sinks,
            value_dim=layer.value_dim, **options,
        )

    return attend


def arrays_of(layer: AttentionLayer, entries: Entries) -> tuple[Any, ...]:
    """Queries, keys and values of a step's new tokens, pages with the old ones, and the step."""
    starts, counts = np.array(entries.starts, np.int32), np.array(entries.counts, np.int32)
    rows, total = len(starts), int(counts.sum())
    T = -(-total // BUCKET) * BUCKET
    pages_A = -(-(starts + counts) // layer.page_size)
    P = int(pages_A.sum()) + 1           # one page is nobody's
    page_RM = np.full((rows, int(pages_A.max())), P - 1, np.int32)
    free = iter(np.random.default_rng(1).permutation(P - 1).tolist())
    is_old_PS = np.zeros((P, layer.page_size), bool)
    for row, (start, count) in enumerate(zip(starts, pages_A, strict=True)):
        page_RM[row, :count] = [next(free) for _ in range(count)]
        slots = np.arange(count * layer.page_size).reshape(count, -1) < start
        is_old_PS[page_RM[row, :count]] = slots
    planned = plan_work(
        row_A=np.arange(rows, dtype=np.int32), start_A=starts, count_A=counts, decode_count=entries.decodes,
        token_count_bucket=T, row_count=rows,
    )
    row_T, position_T = np.full(T, rows, np.int32), np.zeros(T, np.int32)
    row_T[:total] = np.repeat(np.arange(rows), counts)
    position_T[:total] = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts)])
    context = StepContext(
        position_T=jnp.asarray(position_T), row_T=jnp.asarray(row_T), page_RM=(jnp.asarray(page_RM),),
        work=AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()}),
    )
    dtype, K, H = jnp.dtype(layer.dtype), layer.kv_head_count, layer.head_dim
    q = _random(0, (T, layer.head_count, H), dtype)
    new = [_random(seed, (T, K, H), dtype) for seed in (1, 2)]
    pools = [_pool(seed, layer, is_old_PS) for seed in (3, 4)]
    if layer.value_dim is not None:
        return q, new[0], None, LayerKv(k_PKSH=pools[0], v_PKSH=None), context
    return q, *new, LayerKv(k_PKSH=pools[0], v_PKSH=pools[1]), context


def _pool(seed: int, layer: AttentionLayer, is_old_PS: np.ndarray) -> Any:
    P, S = is_old_PS.shape
    size = (P, layer.kv_head_count, S, layer.head_dim)
    is_old_P1S = jnp.asarray(is_old_PS)[:, None]
    if layer.codes is None:
        numbers = _random(seed, size, jnp.dtype(layer.dtype))
        numbers = jnp.where(is_old_P1S[..., None], numbers, jnp.nan)
        stored = storage_dtype(numbers.dtype)
        return numbers if stored == numbers.dtype else numbers.view(stored)
    code = jax.random.randint(jax.random.key(seed), size, -100, 101).astype(layer.codes)
    return QuantizedPages(code, jnp.where(is_old_P1S, jnp.full(size[:-1], 0.01, jnp.float32), jnp.nan))


def _random(seed: int, size: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(jax.random.key(seed), size, dtype)


def milliseconds(attend: Callable[..., tuple[Array, LayerKv]], arrays: tuple[Any, ...]) -> float:
    """Of one call among several in one program; the pages go from one to the next, as in a model."""
    out, _ = jax.eval_shape(attend, *arrays)

    @jax.jit
    def run(calls: Array, q: Array, k: Array, v: Array | None, kv: LayerKv, context: StepContext) -> Any:
        first = jnp.zeros(out.shape, out.dtype), kv
        return jax.lax.fori_loop(0, calls, lambda _, carry: attend(q, k, v, carry[1], context), first)

    def seconds(calls: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(jnp.int32(calls), *arrays))
        return time.perf_counter() - began

    seconds(1)     # compiles
    calls = 1 if seconds(1) > LONG_S else CALLS
    return median(seconds(calls) for _ in range(REPEATS)) * 1e3 / calls


def main() -> int:
    implementation, seconds, asked = sys.argv[1], float(sys.argv[2]), json.load(sys.stdin)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        print(json.dumps([asdict(find(implementation, AttentionLayer(**layer))) for layer in asked]))
    except Exception as error:      # whatever a device says; the last line is what people see of it
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
