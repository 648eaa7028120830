"""One part of `make kernels-gpu`, in this process: results beside the float32 reference, or times beside ceilings.

Knows ops and cases, no engine and no report. Each part returns a dict of figures for JSON; what a library or device
cannot do raises, and the caller notes it. Invariant: figures of a part and the ceilings they are held against are of
the same device, and every time is of the device alone (`device_timing.chained_ms`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.paged_decode.cases import DecodeCase
from kernels_pallas.paged_prefill.cases import PrefillCase
from kernels_pallas.quantized import QuantizedPages
from kernels_pallas.shapes import head_shape
from scripts.bench_kernels import CASES, call_of
from scripts.device_timing import chained_ms, copy_gb_s, evidence, matmul_tflop_s

CALLS = {"cpu": 1}
CALLS_ELSEWHERE = 20
CALLS_OF_LOOPS = 4          # XLA's forms of attention wait for the host in between
BF16 = jnp.dtype(jnp.bfloat16)


def ceilings(*, size: int, side: int) -> dict[str, Any]:
    """A copy of memory and a product of square matrices on this device, and what it is."""
    return evidence() | {"copy_gb_s": copy_gb_s(size), "matmul_tflop_s": matmul_tflop_s(side)}


def numerics(*, op: str, implementation: str, case: dict[str, Any], codes: str | None) -> dict[str, Any]:
    """Largest error beside the reference in float32; pages that no row owns and slots behind a row's end hold NaN."""
    call, arrays = _call(op, case, implementation, codes)
    q, k, v, table, work = arrays
    length = case["context"] if op == "paged_decode" else case["before"] + case["chunk"]
    arrays = (q, _poisoned(k, table, length), _poisoned(v, table, length), table, work)
    got = np.asarray(_run(call, arrays), np.float32)
    exact = (q.astype(jnp.float32), _exact(k), _exact(v), table, work)
    expected = np.asarray(_run(_as(call, "reference"), exact), np.float32)
    return {
        "error": float(np.nan_to_num(np.abs(got - expected)).max() / np.abs(expected).max()),
        "finite": bool(np.isfinite(got).all()),
    }


def invariance(*, implementation: str, case: dict[str, Any]) -> dict[str, Any]:
    """Whether the first row's bits are the same alone and among all rows of a decode step."""
    call, arrays = _call("paged_decode", case, implementation, None)
    q, k, v, table, _ = arrays
    whole = np.asarray(_run(call, arrays)[:1].astype(jnp.float32))
    small, (_, _, _, _, alone) = _call("paged_decode", case | {"rows": 1}, implementation, None)
    single = np.asarray(_run(small, (q[:1], k, v, table[:1], alone)).astype(jnp.float32))
    return {"same_bits": bool((whole == single).all()), "difference": float(np.abs(whole - single).max())}


def speed(*, op: str, implementation: str, case: dict[str, Any], codes: str | None) -> dict[str, Any]:
    """Milliseconds of one call, bytes of context it reads and operations it does a second."""
    call, arrays = _call(op, case, implementation, codes)
    return _rates(op, case, codes, chained_ms(call, arrays, _calls(implementation)))


def baseline(*, op: str, implementation: str, case: dict[str, Any], codes: str | None) -> dict[str, Any]:
    """The same work by kernels that are not ours: keys and values contiguous, or jax's own paged attention."""
    if codes is not None:
        raise ValueError("baselines have 16-bit keys and values")
    run, arrays = BASELINES[implementation](op, case)
    ms = run() if arrays is None else chained_ms(run, arrays, _calls())
    return _rates(op, case, None, ms)


def product_numerics(*, op: str, implementation: str, case: str) -> dict[str, Any]:
    """Largest error of a product of codes beside the reference, in float32 from the same codes."""
    call, arrays = _product(op, implementation, case)
    got = np.asarray(_run(call, arrays), np.float32)
    expected = np.asarray(_run(_as(call, "reference"), arrays), np.float32)
    error = np.nan_to_num(np.abs(got - expected)).max() / np.abs(expected).max()
    return {"error": float(error), "finite": bool(np.isfinite(got).all())}


def product_speed(*, op: str, implementation: str, case: str) -> dict[str, Any]:
    """Milliseconds of a product of codes, bytes of weights it reads a second, and bfloat16's time over its own."""
    call, arrays = _product(op, implementation, case)
    (T, ins), outs = arrays[0].shape, arrays[1].shape[0]
    ms = chained_ms(partial(narrowed, call), arrays, _calls())
    read = sum(part.nbytes for part in jax.tree.leaves(arrays[1:]))
    plain = tuple(jax.random.normal(jax.random.key(seed), (size, ins), BF16) for seed, size in enumerate((T, outs)))
    bf16_ms = chained_ms(partial(narrowed, _plain_product), plain, _calls())
    return {
        "ms": ms, "gb_s": read / ms / 1e6, "tflop_s": 2 * T * ins * outs / ms / 1e9, "bf16 ms": bf16_ms,
        "times bf16": bf16_ms / ms,
    }


def _product(op: str, implementation: str, case: str) -> tuple[Any, tuple[Any, ...]]:
    return call_of(op, next(one for one in CASES[op] if one.name == case), BF16, implementation)


def _plain_product(x_TI: Array, weight_OI: Array) -> Array:
    return jnp.einsum("TI,OI->TO", x_TI, weight_OI, preferred_element_type=jnp.float32)


def narrowed(op: Callable[..., Array], x_TI: Array, *rest: Any) -> Array:
    """As many columns as x has, of a whole product: `chained_ms` feeds them to the next."""
    return jax.lax.optimization_barrier(op(x_TI, *rest))[:, : x_TI.shape[1]]


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "ceilings": ceilings, "numerics": numerics, "invariance": invariance, "speed": speed, "baseline": baseline,
    "product_numerics": product_numerics, "product_speed": product_speed,
}


def _calls(implementation: str = "") -> int:
    return CALLS.get(jax.default_backend(), CALLS_OF_LOOPS if implementation == "xla" else CALLS_ELSEWHERE)


def _case(op: str, case: dict[str, Any]) -> Any:
    """From plain values: a geometry's name, or what differs from it."""
    shape = dataclasses.replace(head_shape(case["shape"]), **case.get("changes", {}))
    rest = {name: value for name, value in case.items() if name not in ("shape", "changes")}
    return (DecodeCase if op == "paged_decode" else PrefillCase)(shape=shape, **rest)


def _call(op: str, case: dict[str, Any], implementation: str, codes: str | None) -> tuple[Any, tuple[Any, ...]]:
    call, arrays = call_of(op, _case(op, case), BF16, implementation, codes=codes)
    if implementation == "triton" and jax.default_backend() == "cpu":      # for tests of this file
        return _interpreted(op, call), arrays
    return call, arrays


def _interpreted(op: str, call: Any) -> Any:
    import importlib

    kernel = getattr(importlib.import_module(f"kernels_pallas.{op}.triton"), op)
    options = {"sink_N": None} | {name: value for name, value in call.keywords.items() if name != "implementation"}
    return partial(kernel, is_interpreted=True, **options)


def _as(call: Any, implementation: str) -> Any:
    options = {name: value for name, value in call.keywords.items() if name not in ("implementation", "is_interpreted")}
    if call.func.__module__.endswith("triton"):
        import importlib

        op = call.func.__name__
        return partial(getattr(importlib.import_module(f"kernels_pallas.{op}"), op), implementation=implementation,
                       **options)
    return partial(call.func, implementation=implementation, **options)


def _run(call: Any, arrays: tuple[Any, ...]) -> Array:
    return jax.jit(call)(*arrays)


def _poisoned(pool: Any, table_RM: Array, length: int) -> Any:
    """The pool with as many pages of NaN behind it, and NaN in what the rows' last pages have left."""
    if pool is None:     # keys are values too
        return None
    if isinstance(pool, QuantizedPages):
        return QuantizedPages(jnp.concatenate([pool.code_PKSH] * 2), _poisoned(pool.scale_PKS, table_RM, length))
    left = length % pool.shape[2] or pool.shape[2]
    return jnp.concatenate([pool.at[table_RM[:, -1], :, left:].set(jnp.nan), jnp.full_like(pool, jnp.nan)])


def _exact(pool: Any) -> Any:
    return pool if pool is None or isinstance(pool, QuantizedPages) else pool.astype(jnp.float32)


def _rates(op: str, case: dict[str, Any], codes: str | None, ms: float) -> dict[str, Any]:
    """Of the context that is seen: a causal chunk sees half of itself."""
    made = _case(op, case)
    shape, itemsize = made.shape, 2 if codes is None else 1
    if op == "paged_decode":
        read = made.rows * min(made.context, shape.window or made.context)
        pairs = read
    else:
        read = made.chunk + made.before
        pairs = made.chunk * made.before + made.chunk * (made.chunk + 1) // 2
        if shape.window is not None:
            pairs = min(pairs, made.chunk * shape.window)
    planes = 2 if shape.latent_dim is None else 1
    read_bytes = planes * read * shape.kv_head_count * (shape.head_dim * itemsize + (4 if codes else 0))
    operations = 2 * pairs * shape.head_count * (shape.head_dim + shape.value_dim)
    return {"ms": ms, "gb_s": read_bytes / ms / 1e6, "tflop_s": operations / ms / 1e9}


def _dense(op: str, case: dict[str, Any]) -> tuple[Any, Array, Array, Array, int]:
    """[B, T, N, H] queries and [B, C, K, H] keys and values."""
    made = _case(op, case)
    shape = made.shape
    if shape.window or shape.soft_cap or shape.has_sinks or shape.latent_dim:
        raise ValueError(f"{shape.name} has a window, soft cap, sinks or a latent cache: not in this baseline")
    if op == "paged_decode":
        rows, new, context = made.rows, 1, made.context
    else:
        rows, new, context = 1, made.chunk, made.chunk + made.before
    key = jax.random.key(0)
    q = jax.random.normal(key, (rows, new, shape.head_count, shape.head_dim), BF16)
    k, v = (
        jax.random.normal(jax.random.key(seed), (rows, context, shape.kv_head_count, shape.head_dim), BF16)
        for seed in (1, 2)
    )
    return made, q, k, v, context


def _cudnn(op: str, case: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    _, q, k, v, context = _dense(op, case)
    if op == "paged_prefill" and q.shape[1] != context:
        raise ValueError("cuDNN's causal mask is of whole prompts here")
    causal = op == "paged_prefill"
    return partial(_attend_densely, is_causal=causal), (q, k, v)


def _attend_densely(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn")


def _jax_paged(op: str, case: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    if op != "paged_decode":
        raise ValueError("jax's paged_attention decodes only")
    made, q, k, v, context = _dense(op, case)
    slots = 16
    pages = context // slots
    pools = tuple(x.reshape(made.rows * pages, slots, *x.shape[2:]).transpose(2, 0, 1, 3) for x in (k, v))
    table = jnp.arange(made.rows * pages, dtype=jnp.int32).reshape(made.rows, pages)
    lengths = jnp.full(made.rows, context, jnp.int32)
    return paged_attention, (q[:, 0], *pools, table, lengths)


def _torch(op: str, case: dict[str, Any], *, is_flexible: bool = False) -> tuple[Callable[[], float], None]:
    import torch

    made, q, k, v, context = _dense(op, case)
    causal = op == "paged_prefill"
    if causal and made.before:
        raise ValueError("torch's causal mask is of whole prompts here")
    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    on_gpu = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    del q, k, v, context

    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    if is_flexible:
        attend = _flexible(op, made.chunk if causal else 1)

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for index in range(CALLS_ELSEWHERE + 3):
            if index == 3:
                start.record()
            attend(*on_gpu)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / CALLS_ELSEWHERE

    return run, None


def _flexible(op: str, tokens: int) -> Callable[..., Any]:
    """torch's flex attention, compiled; causal where it is a prompt."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    if op == "paged_decode":
        return partial(compiled, enable_gqa=True)

    def is_seen(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return query >= key

    mask = create_block_mask(is_seen, None, None, tokens, tokens, device="cuda")
    return partial(compiled, block_mask=mask, enable_gqa=True)


BASELINES: dict[str, Callable[[str, dict[str, Any]], tuple[Any, tuple[Any, ...] | None]]] = {
    "cudnn": _cudnn, "jax paged_attention": _jax_paged, "torch sdpa": _torch,
    "torch flex": partial(_torch, is_flexible=True),
}
