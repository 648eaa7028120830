"""How near a step comes to the machine: bytes and operations it must spend, against speeds measured in the same run.

Counted are the weights, read once a step, keys and values of the context, and two operations a weight and token. Not
counted: activations, norms, sampling, scores. Of a mixture all experts are, so its share is an upper bound.
Knows no engine. Invariant: the ceilings are of this device, in this process, minutes from the steps they bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.core.model_spec import ModelSpec

REPEATS = 7
CALLS = {"cpu": 1}                  # that are timed together: on a GPU the last is waited for
CALLS_ELSEWHERE = 8
READ_BYTES = {"cpu": 1 << 28}       # past every cache of a host
READ_BYTES_ELSEWHERE = 1 << 31
SIDE = {"cpu": 1536}                # of the square matrices multiplied
SIDE_ELSEWHERE = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device did at best: reading memory, and multiplying large square matrices of the model's type."""

    read_gb_s: float
    dot_gflop_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What every step of a model must do.

    Attributes:
      weight_bytes: of the matrices a step reads whole: all parameters but a table that is only looked up.
      token_flop: two a weight that every token passes (the head is passed by sampling rows alone).  head_flop: those.
      context_bytes: keys and values of one token, all layers.
    """

    weight_bytes: int
    head_bytes: int
    token_flop: int
    head_flop: int
    context_bytes: int

    def decode_gb_s(self, rows: int, context: int, ms: float) -> float:
        return (self.weight_bytes + rows * context * self.context_bytes) / ms / 1e6

    def decode_gflop_s(self, rows: int, ms: float) -> float:
        return rows * (self.token_flop + self.head_flop) / ms / 1e6

    def prefill_gflop_s(self, tokens: int, ms: float) -> float:
        return tokens * self.token_flop / ms / 1e6

    def prefill_gb_s(self, ms: float) -> float:
        return (self.weight_bytes - self.head_bytes) / ms / 1e6


def step_work(spec: ModelSpec, params: dict[str, Any], kv_itemsize: int) -> StepWork:
    """From the parameters as they lie on the device, packed or not."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    matrices = [(path[0].key, leaf) for path, leaf in leaves if leaf.ndim >= 2]
    tables = ("embedding", "positions")
    head = "embedding" if spec.is_tied else "head"
    body = [leaf for name, leaf in matrices if name not in (*tables, head)]
    heads = [leaf for name, leaf in matrices if name == head]
    head_bytes = sum(leaf.nbytes for leaf in heads)
    return StepWork(
        weight_bytes=sum(leaf.nbytes for leaf in body) + head_bytes, head_bytes=head_bytes,
        token_flop=2 * sum(leaf.size for leaf in body), head_flop=2 * sum(leaf.size for leaf in heads),
        context_bytes=sum(group.page_bytes(1, kv_itemsize) for group in spec.kv_groups),
    )


def measure(dtype: jnp.dtype) -> Ceilings:
    """One reading of memory and one product, medians of REPEATS."""
    platform = jax.default_backend()
    words = READ_BYTES.get(platform, READ_BYTES_ELSEWHERE) // 4
    rows = jnp.ones((words // 4096, 4096), jnp.float32)
    side = SIDE.get(platform, SIDE_ELSEWHERE)
    square = jnp.full((side, side), 0.5, dtype)
    if platform != "cpu":      # a GPU multiplies constants faster
        square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    return Ceilings(
        read_gb_s=rows.nbytes / _seconds(_read if platform == "cpu" else _sum, rows) / 1e9,
        dot_gflop_s=2 * side**3 / _seconds(_product, square) / 1e9,
    )


@jax.jit
def _read(rows: Array) -> Array:
    return rows @ rows[0]      # the one product that XLA's CPU backend runs at the speed of memory


@jax.jit
def _sum(rows: Array) -> Array:
    return rows.sum(-1)


@jax.jit
def _product(square: Array) -> Array:
    return jnp.einsum("ik,jk->ij", square, square, preferred_element_type=jnp.float32)


def _seconds(function: Callable[[Array], Array], operand: Array) -> float:
    calls = CALLS.get(jax.default_backend(), CALLS_ELSEWHERE)
    function(operand).block_until_ready()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready([function(operand) for _ in range(calls)])
        times.append((time.perf_counter() - began) / calls)
    return median(times)
