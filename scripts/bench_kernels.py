"""Milliseconds of the kernel library's ops on the named cases of real models, by implementation. Medians of --repeats.

    python scripts/bench_kernels.py                                  # the demo model's cases, XLA's implementation
    python scripts/bench_kernels.py --shape llama3-8b --op paged_decode --implementation xla reference
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.eight_bit_matmul import cases as eight_bit_matmul_cases
from kernels_pallas.eight_bit_matmul import eight_bit_matmul
from kernels_pallas.grouped_matmul import cases as grouped_matmul_cases
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.kv_write import cases as kv_write_cases
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_decode import cases as paged_decode_cases
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import cases as paged_prefill_cases
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.quantized import Pages, QuantizedPages, quantize
from kernels_pallas.quantized_matmul import PackedWeight, quantized_matmul
from kernels_pallas.quantized_matmul import cases as quantized_matmul_cases
from kernels_pallas.shapes import HeadShape
from kernels_pallas.storage import storage_dtype
from kernels_pallas.work import AttentionWork, plan_work

SLOTS = 16   # of a page
CASES: dict[str, tuple[Any, ...]] = {
    "paged_decode": paged_decode_cases.CASES,
    "paged_prefill": paged_prefill_cases.CASES,
    "kv_write": kv_write_cases.CASES,
    "grouped_matmul": grouped_matmul_cases.CASES,
    "quantized_matmul": quantized_matmul_cases.CASES,
    "eight_bit_matmul": eight_bit_matmul_cases.CASES,
}

Call = tuple[Callable[..., jax.Array], tuple[Any, ...]]   # an op with its options bound, and its arrays


def call_of(
    op: str, case: Any, dtype: jnp.dtype, implementation: str | None = None, *, slots: int = SLOTS,
    codes: str | None = None,
) -> Call:
    """What a case stands for, on random numbers; attention over pages of `slots`, as `codes` where either says so."""
    if op == "grouped_matmul":
        return _grouped(case, dtype, implementation)
    if op == "quantized_matmul":
        return _packed(case, dtype, implementation)
    if op == "eight_bit_matmul":
        return _eight_bits(case, implementation)
    if op == "kv_write":
        return _write(case, dtype, implementation)
    attend = partial(
        _attend, shape=case.shape, dtype=dtype, implementation=implementation, slots=slots, codes=codes or case.codes
    )
    if op == "paged_decode":
        return attend(paged_decode, starts=[case.context - 1] * case.rows, count=1)
    return attend(paged_prefill, starts=[case.before], count=case.chunk)


def _attend(
    op: Callable[..., jax.Array], *, shape: HeadShape, dtype: jnp.dtype, implementation: str | None, slots: int,
    codes: str | None, starts: list[int], count: int,
) -> Call:
    """One step of equal rows: each has `count` new tokens after `starts` old ones. Pages lie apart in the pool."""
    rows = len(starts)
    row_A, start_A = np.arange(rows, dtype=np.int32), np.array(starts, np.int32)
    count_A = np.full(rows, count, np.int32)
    tokens = rows * count
    pages = -(-(max(starts) + count) // slots)
    page_RM = np.random.default_rng(0).permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    planned = plan_work(
        row_A=row_A, start_A=start_A, count_A=count_A, decode_count=rows if count == 1 else 0,
        token_count_bucket=tokens, row_count=rows,
    )
    work = AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()})
    size = (rows * pages, shape.kv_head_count, slots, shape.head_dim)
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}
    if shape.has_sinks:
        options["sink_N"] = jnp.zeros(shape.head_count, jnp.float32)
    if shape.latent_dim is not None:
        options["value_dim"] = shape.latent_dim
    pools = (_pool(size, dtype, codes, 1), None if shape.latent_dim else _pool(size, dtype, codes, 2))
    arrays = (_random((tokens, shape.head_count, shape.head_dim), dtype), *pools, jnp.asarray(page_RM), work)
    return partial(op, implementation=implementation, **options), arrays


def _write(case: Any, dtype: jnp.dtype, implementation: str | None) -> Call:
    shape, tokens = case.shape, case.tokens
    pages = -(-tokens // SLOTS)
    size = (pages * 4, shape.kv_head_count, SLOTS, shape.head_dim)
    pool: Pages = jnp.zeros(size, storage_dtype(dtype))
    if case.codes is not None:
        pool = QuantizedPages(jnp.zeros(size, case.codes), jnp.zeros(size[:3], jnp.float32))
    page_RM = jnp.arange(pages, dtype=jnp.int32)[None]
    row_T, position_T = jnp.zeros(tokens, jnp.int32), jnp.arange(tokens, dtype=jnp.int32)
    x_TKH = _random((tokens, shape.kv_head_count, shape.head_dim), dtype)
    return partial(kv_write, implementation=implementation), (pool, x_TKH, page_RM, row_T, position_T)


def _grouped(case: Any, dtype: jnp.dtype, implementation: str | None) -> Call:
    """Tokens that choose their experts at random."""
    rows = case.tokens * case.chosen
    expert_A = np.random.default_rng(0).integers(0, case.experts, rows)
    count_E = jnp.asarray(np.bincount(expert_A, minlength=case.experts), jnp.int32)
    weight_EOI = _random((case.experts, case.width_out, case.width), dtype)
    return partial(grouped_matmul, implementation=implementation), (
        _random((rows, case.width), dtype), weight_EOI, count_E
    )


def _packed(case: Any, dtype: jnp.dtype, implementation: str | None) -> Call:
    bytes_ = case.width // (2 if case.code in ("int4", "lut4") else 1)
    codes = jnp.arange(case.width_out * bytes_, dtype=jnp.uint32) % 112     # of an 8-bit float, too: never NaN
    scale_OG = jnp.full((case.width_out, case.width // case.group), 0.01, jnp.float16)
    beside: dict[str, jax.Array] = {}
    if case.code == "lut4":
        tables = 1 if case.extra == "shared table" else case.width_out
        beside["table_ET"] = _random((tables, 16), jnp.dtype(jnp.float32))
    elif case.extra == "zero":
        beside["zero_OG"] = jnp.full(scale_OG.shape, 8, jnp.uint8)
    elif case.extra == "offset":
        beside["offset_OG"] = jnp.full(scale_OG.shape, -0.08, scale_OG.dtype)
    weight = PackedWeight(
        code=case.code, code_OC=codes.astype(jnp.uint8).reshape(case.width_out, bytes_),
        scale_OG=scale_OG if case.code.startswith("int") else scale_OG.astype(jnp.float32), **beside,
    )
    call = partial(quantized_matmul, implementation=implementation)
    return call, (_random((case.tokens, case.width), dtype), weight)


def _eight_bits(case: Any, implementation: str | None) -> Call:
    """Whole numbers from -7 to 7, which both types hold."""
    sides = (
        jnp.clip(_random((size, case.width), jnp.dtype(jnp.float32), seed) * 3, -7, 7).round().astype(case.dtype)
        for seed, size in enumerate((case.tokens, case.width_out))
    )
    scales = () if case.groups == 1 else tuple(
        jnp.full((size, case.groups), 0.01, jnp.float32) for size in (case.tokens, case.width_out)
    )
    return partial(eight_bit_matmul, implementation=implementation), (*sides, *scales)


def _pool(size: tuple[int, ...], dtype: jnp.dtype, codes: str | None, seed: int) -> Pages:
    numbers = _random(size, dtype, seed)
    if codes is None:
        return numbers
    code, scale = quantize(numbers.reshape(-1, *size[2:]), codes, jnp.float32)
    return QuantizedPages(code.reshape(size), scale.reshape(size[:3]))


def _random(shape: tuple[int, ...], dtype: jnp.dtype, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def milliseconds(call: Call, repeats: int) -> float:
    """Median of `repeats`, compilation and a first run left out."""
    run, arrays = jax.jit(call[0]), call[1]
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return median(times) * 1e3


def _model(case: Any) -> str:
    """Whose geometry a case has."""
    return str(case.model if hasattr(case, "model") else case.shape.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", help="a model's geometry, or 'all'")
    parser.add_argument("--op", choices=sorted(CASES), nargs="+", default=sorted(CASES))
    parser.add_argument("--implementation", nargs="+", default=["xla"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {options.dtype}, jax {jax.__version__}; ms")
    for op in options.op:
        for case in CASES[op]:
            if options.shape in ("all", _model(case)):
                dtype = jnp.dtype(options.dtype)
                figures = (
                    f"{name} {milliseconds(call_of(op, case, dtype, name), options.repeats):8.3f}"
                    for name in options.implementation
                )
                print(f"{op:14} {case.name:32}", *figures, flush=True)


if __name__ == "__main__":
    main()
