"""The attention layer over pages: a sequence in pieces equals the sequence at once, and padding does nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.model_spec import Global, SlidingWindow
from jaxserve.layers.context import LayerKv, StepContext
from jaxserve.layers.paged import attend
from kernels_pallas.storage import storage_dtype
from kernels_pallas.work import AttentionWork, plan_work

N, K, H, S, R, M = 4, 2, 16, 16, 6, 8
P = R * M


@functools.partial(jax.jit, static_argnames=("scale", "span", "has_prefill"), donate_argnames="kv")
def run(q, k, v, kv, context, *, scale, span, has_prefill=True):
    return attend(q, k, v, kv, context, 0, scale=scale, span=span, has_prefill=has_prefill)


class Pool:
    """Pages of one layer; every row has its own, in shuffled order."""

    def __init__(self, dtype, window=None):
        self.dtype, self.span = dtype, SlidingWindow(window) if window else Global()
        pages = jnp.full((P, K, S, H), jnp.nan, dtype)       # what nobody wrote must not matter
        pages = pages if storage_dtype(dtype) == dtype else jax.lax.bitcast_convert_type(pages, storage_dtype(dtype))
        self.kv = LayerKv(k_PKSH=pages, v_PKSH=pages + 0)
        self.page_RM = jnp.asarray(np.random.default_rng(1).permutation(P).reshape(R, M), jnp.int32)

    def step(self, entries, decode_count, qkv_of, tokens=96, *, has_prefill=True):
        """`entries` are (row, start, count); returns each entry's output."""
        row, start, count = (np.array(column, np.int32) for column in zip(*entries, strict=True))
        total = int(count.sum())
        row_T, position_T = np.full(tokens, R, np.int32), np.zeros(tokens, np.int32)
        row_T[:total] = np.repeat(row, count)
        position_T[:total] = np.concatenate([np.arange(s, s + n) for s, n in zip(start, count, strict=True)])
        planned = plan_work(
            row_A=row, start_A=start, count_A=count, decode_count=decode_count, token_count_bucket=tokens, row_count=R
        )
        packed = []
        for part in range(3):
            real = np.concatenate([qkv_of[r][part][s : s + n] for r, s, n in entries])
            whole = np.full((tokens, *real.shape[1:]), np.nan, np.float32)
            whole[:total] = real
            packed.append(jnp.asarray(whole, self.dtype))
        context = StepContext(
            position_T=jnp.asarray(position_T), row_T=jnp.asarray(row_T), page_RM=(self.page_RM,),
            work=AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()}),
        )
        out, self.kv = run(
            *packed, self.kv, context, scale=H**-0.5, span=self.span, has_prefill=has_prefill
        )
        out = np.asarray(out.astype(jnp.float32))
        assert (out[total:] == 0).all()
        return np.split(out[:total], np.cumsum(count)[:-1])


def sequences(lengths: dict[int, int]):
    rng = np.random.default_rng(0)
    return {
        row: tuple(rng.normal(size=(n, heads, H)).astype(np.float32) for heads in (N, K, K))
        for row, n in lengths.items()
    }


def dense(q, k, v, window):
    """Causal attention of one whole sequence in numpy, float64."""
    n = len(q)
    k, v = (np.repeat(x.astype(np.float64), N // K, axis=1) for x in (k, v))
    score = np.einsum("qnh,cnh->nqc", q.astype(np.float64), k) * H**-0.5
    at = np.arange(n)
    seen = at <= at[:, None]
    if window:
        seen &= at > at[:, None] - window
    score = np.where(seen, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("nqc,cnh->qnh", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("window", [None, 20])
def test_chunks_and_decodes_equal_dense_attention(window):
    qkv = sequences({0: 70, 3: 50, 5: 40})
    pool = Pool(jnp.float32, window)
    found = {row: [] for row in qkv}
    steps = [
        ([(3, 0, 33), (0, 0, 50)], 0),
        ([(3, 33, 1), (5, 0, 17), (0, 50, 7)], 1),
        ([(0, 57, 1), (3, 34, 1), (5, 17, 20)], 2),
        ([(5, 37, 1), (0, 58, 1), (3, 35, 1)], 3),
        ([(3, 36, 14), (5, 38, 2), (0, 59, 11)], 0),
    ]
    for entries, decode_count in steps:
        for (row, _, _), out in zip(entries, pool.step(entries, decode_count, qkv), strict=True):
            found[row].append(out)
    for row, (q, k, v) in qkv.items():
        np.testing.assert_allclose(np.concatenate(found[row]), dense(q, k, v, window), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_prefill_decodes_get_the_same_bits_and_padding_is_zero(dtype):
    qkv = sequences({0: 70, 3: 50, 5: 40})
    pools = Pool(dtype), Pool(dtype)
    for pool in pools:
        pool.step([(3, 0, 49), (0, 0, 40)], 0, qkv)
        pool.step([(0, 40, 29), (5, 0, 39)], 0, qkv)
    entries = [(5, 39, 1), (0, 69, 1), (3, 49, 1)]
    whole, without = (pool.step(entries, 3, qkv, has_prefill=pool is pools[0]) for pool in pools)
    np.testing.assert_array_equal(whole, without)
    for pages, others in zip(*(pool.kv for pool in pools), strict=True):
        assert np.asarray(pages).tobytes() == np.asarray(others).tobytes()


def test_bfloat16_pages_hold_and_serve():
    qkv = sequences({2: 40})
    pool = Pool(jnp.bfloat16)
    out = [pool.step([(2, 0, 39)], 0, qkv)[0], pool.step([(2, 39, 1)], 1, qkv)[0]]
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in qkv[2]]
    np.testing.assert_allclose(np.concatenate(out), dense(*rounded, None), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_whole_layer_writes_its_pages_in_place(dtype):
    """Donated pages alias the outputs; temporaries are far smaller than the pool."""
    tokens, big = 16, 2048
    kv = LayerKv(*[jax.ShapeDtypeStruct((big, K, S, H), storage_dtype(dtype))] * 2)
    names = ("row_A", "start_A", "count_A")
    planned = plan_work(
        **dict.fromkeys(names, np.ones(1, np.int32)), decode_count=1, token_count_bucket=tokens, row_count=R
    )
    one = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    context = StepContext(
        position_T=one, row_T=one, page_RM=(jax.ShapeDtypeStruct((R, M), jnp.int32),),
        work=AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()}),
    )
    q, k = (jax.ShapeDtypeStruct((tokens, heads, H), dtype) for heads in (N, K))
    memory = run.lower(q, k, k, kv, context, scale=1.0, span=Global()).compile().memory_analysis()
    pool_bytes = 2 * big * K * S * H * jnp.dtype(storage_dtype(dtype)).itemsize
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4
