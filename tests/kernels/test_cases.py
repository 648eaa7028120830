"""Every named case of every op is a request its contract accepts, and traces to the right shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from scripts.bench_kernels import CASES, call_of

NAMED = [(op, case) for op, cases in CASES.items() for case in cases]


def test_names_are_unique() -> None:
    for cases in CASES.values():
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(("op", "case"), NAMED, ids=lambda item: getattr(item, "name", item))
def test_cases_are_accepted_and_traced(op: str, case: Any) -> None:
    def run() -> tuple[jax.Array, jax.Array]:
        call, arrays = call_of(op, case, jnp.dtype(jnp.bfloat16), "xla")
        return call(*arrays), arrays[0]

    out, first = jax.eval_shape(run)   # traced only: the pools of the largest cases are gigabytes
    if op in ("grouped_matmul", "quantized_matmul", "eight_bit_matmul"):
        assert out.shape == (first.shape[0], case.width_out)
    else:
        width = case.shape.head_dim if op == "kv_write" else case.shape.value_dim
        assert out.shape == (*first.shape[:-1], width)
