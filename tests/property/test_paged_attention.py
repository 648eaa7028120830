"""Paged attention against its specification over random steps: page tables, lengths around edges, shared prefixes,
windows, groups, latent caches as numbers and as codes. Every slot that no token may see holds NaN. (Mosaic GPU:
`tests/kernels/test_simulator.py`.)"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.native import api as native
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.quantized import FP8, Pages, QuantizedPages, quantize
from kernels_pallas.work import AttentionWork, plan_work

R, T, S, M = 5, 40, 16, 140
P = R * M + 2
N = 6
OPS = {"paged_decode": paged_decode, "paged_prefill": paged_prefill}
LENGTHS = (0, 1, S - 1, S, S + 1, 2 * S, 63, 64, 65, 255, 256, 257, 1023, 2049)     # tokens before a step's


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """What the pages hold; with `value_dim` keys are values too."""

    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int | None = None
    codes: str | None = None


PLAIN = Cache()
LATENT, LATENT_INT8, LATENT_FP8 = (
    Cache(kv_heads=1, head_dim=48, value_dim=32, codes=codes) for codes in (None, "int8", FP8)
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Entries are (row, tokens before, tokens), decodes first; `shared` pages of row [1] are those of row [0]."""

    entries: tuple[tuple[int, int, int], ...]
    decode_count: int
    shared: tuple[int, int] | None
    seed: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows = draw(st.permutations(range(R)))[: draw(st.integers(1, R))]
    decode_count = draw(st.integers(0, len(rows)))
    starts = [draw(st.sampled_from(LENGTHS) | st.integers(0, 2200)) for _ in rows]
    counts = [1 if i < decode_count else draw(st.integers(1, T // R)) for i in range(len(rows))]
    entries = tuple(zip(rows, starts, counts, strict=True))
    shared = (rows[0], rows[1]) if len(rows) > 1 and draw(st.booleans()) else None
    return Step(entries=entries, decode_count=decode_count, shared=shared, seed=draw(st.integers(0, 99)))


def arrays_of(step: Step, window: int | None, dtype: str, cache: Cache) -> tuple[Any, ...]:
    rng = np.random.default_rng(step.seed)
    page_RM = rng.permutation(P)[: R * M].reshape(R, M).astype(np.int32)
    held_of = {row: start for row, start, _ in step.entries}
    if step.shared is not None:      # whole pages that both had before this step
        one, other = step.shared
        common = min(held_of[one], held_of[other]) // S
        page_RM[other, :common] = page_RM[one, :common]
    seen_PS = np.zeros((P, S), bool)
    for row, start, count in step.entries:
        at = np.arange(max(0, start + 1 - window) if window else 0, start + count)
        seen_PS[page_RM[row, at // S], at % S] = True
    size = (P, cache.kv_heads, S, cache.head_dim)
    pools = [
        pool_of(rng.standard_normal(size, np.float32), seen_PS, dtype, cache.codes)
        for _ in range(1 if cache.value_dim else 2)
    ]
    row_A, start_A, count_A = np.array(step.entries, np.int32).T.copy()
    planned = plan_work(
        row_A=row_A, start_A=start_A, count_A=count_A, decode_count=step.decode_count, token_count_bucket=T,
        row_count=R,
    )
    work = AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()})
    q_TNH = jnp.asarray(rng.standard_normal((T, N, cache.head_dim), np.float32), dtype)
    return (q_TNH, pools[0], None if cache.value_dim else pools[1], jnp.asarray(page_RM), work)


def pool_of(x_PKSH: np.ndarray, seen_PS: np.ndarray, dtype: str, codes: str | None) -> Pages:
    is_seen = seen_PS[:, None, :, None]
    if codes is None:
        return jnp.asarray(np.where(is_seen, x_PKSH, np.nan), dtype)
    code, scale = quantize(jnp.asarray(x_PKSH).reshape(-1, *x_PKSH.shape[2:]), codes, jnp.float32)
    code_PKSH = code.reshape(x_PKSH.shape)
    if codes == FP8:
        code_PKSH = jnp.where(is_seen, code_PKSH, jnp.nan).astype(codes)
    return QuantizedPages(code_PKSH, jnp.where(is_seen[..., 0], scale.reshape(x_PKSH.shape[:3]), jnp.nan))


@functools.cache
def compiled(op: str, implementation: str, window: int | None, cache: Cache) -> Callable[..., jax.Array]:
    options: dict[str, Any] = {"scale": cache.head_dim**-0.5, "window": window, "value_dim": cache.value_dim}
    if implementation == "triton":
        kernel = getattr(importlib.import_module(f"kernels_pallas.{op}.triton"), op)
        return jax.jit(functools.partial(kernel, is_interpreted=True, soft_cap=None, sink_N=None, **options))
    return jax.jit(functools.partial(OPS[op], implementation=implementation, **options))


def check(
    step: Step, implementation: str, dtype: str, window: int | None, tolerance: float, cache: Cache = PLAIN
) -> None:
    arrays = arrays_of(step, window, dtype, cache)
    for op in OPS:
        expected, got = (
            np.asarray(compiled(op, name, window, cache)(*arrays), np.float32) for name in ("reference", implementation)
        )
        assert np.isfinite(got).all(), f"{op}: poison was read"
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=op)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(step=steps(), window=st.sampled_from((None, 20)))
def test_xla_equals_the_specification(step: Step, window: int | None) -> None:
    check(step, "xla", "float32", window, 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", ["xla", "native", "triton"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(step=steps(), window=st.sampled_from((None, 1, 17, 300)))
def test_sixteen_bits_equal_the_specification(implementation: str, step: Step, window: int | None) -> None:
    if implementation == "native" and native.refusals():
        pytest.skip("; ".join(native.refusals()))
    check(step, implementation, "bfloat16", window, 2e-2)


@pytest.mark.parametrize("cache", [
    pytest.param(LATENT, marks=pytest.mark.slow), LATENT_INT8, pytest.param(LATENT_FP8, marks=pytest.mark.slow),
], ids=["numbers", "int8", "fp8"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(step=steps())
def test_a_latent_cache_equals_the_specification(cache: Cache, step: Step) -> None:
    check(step, "xla", "float32", None, 1e-5, cache)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("implementation", "cache"), [
    ("xla", LATENT_INT8), ("xla", LATENT_FP8), ("triton", LATENT), ("triton", LATENT_INT8),
], ids=["xla-int8", "xla-fp8", "triton-numbers", "triton-int8"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(step=steps(), window=st.sampled_from((None, 17)))
def test_a_latent_cache_in_sixteen_bits_equals_the_specification(
    implementation: str, cache: Cache, step: Step, window: int | None
) -> None:
    check(step, implementation, "bfloat16", window, 2e-2, cache)
