"""Attention of a step's prefill section: chunks of query tokens, causal from any offset, over paged context.

Contract: the tokens of the plan's tiles are computed, all others are zero. A token at position p sees slots [0, p] of
its row (the newest `window` of them), never another slot, whatever that holds. Softmax in float32.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas import contract, hopper
from kernels_pallas.paged_prefill import reference, xla
from kernels_pallas.quantized import Pages
from kernels_pallas.work import AttentionWork

QUANTIZED_HEAD_DIM_MAX = 128     # of `mosaic_gpu`: heads of 256 would spill 60 registers


def _implementation(name: str) -> Callable[..., Array]:
    if name == "mosaic_gpu":
        from kernels_pallas.paged_prefill import mosaic_gpu  # late: it needs jax >= 0.11

        return mosaic_gpu.paged_prefill
    if name == "triton":
        from kernels_pallas.paged_prefill import triton  # late: jax warns on import that it is deprecated

        return triton.paged_prefill
    if name == "native":
        from kernels_pallas.native import api as native  # late: it compiles for this host

        return native.paged_prefill
    return {"xla": xla.paged_prefill, "reference": reference.paged_prefill}[name]


def paged_prefill(
    q_TNH: Array,
    k_PKSH: Pages,
    v_PKSH: Pages | None,
    page_RM: Array,
    work: AttentionWork,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_N: Array | None = None,
    value_dim: int | None = None,
    implementation: str | None = None,
) -> Array:
    """Grouped-query attention of the prefill chunks; [T, N, H] like q, or [T, N, value_dim].

    Args:
      q_TNH: packed queries of the step.  k_PKSH, v_PKSH: the pool, the step's own keys and values already written;
        arrays in the dtype of q (or its bits as uint16), or `QuantizedPages`. v_PKSH None: keys are values too.
      page_RM: page of each row's slots [m * S, (m + 1) * S); entries past a row's length are never looked at.
      window: a token sees the newest `window` positions, its own included; None sees all.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      sink_N: a logit a head that counts in the softmax's denominator and has no value.
      value_dim: where keys are values too (a latent cache), the first of their numbers that are; the last axis of the
        result, which is H otherwise.
      implementation: "native", "xla", "reference", "mosaic_gpu", "triton", or None for the first of these that serves.
    """
    violations = contract.attention_violations(
        q_TNH, k_PKSH, v_PKSH, page_RM, work, window=window, soft_cap=soft_cap, sink_N=sink_N,
        value_dim=value_dim,
    )
    contract.require("paged_prefill", violations)
    refusals = {
        "native": lambda: contract.native_refusals(q_TNH, k_PKSH, soft_cap, is_latent=v_PKSH is None),
        "xla": lambda: contract.dtype_refusals(q_TNH, k_PKSH),
        "reference": lambda: contract.dtype_refusals(q_TNH, k_PKSH),
        "mosaic_gpu": lambda: (
            hopper.refusals(q_TNH, k_PKSH, QUANTIZED_HEAD_DIM_MAX) if value_dim is None else hopper.latent_refusals(
                q_TNH, k_PKSH, value_dim, window=window, soft_cap=soft_cap, has_sinks=sink_N is not None
            )
        ),
        "triton": lambda: contract.triton_refusals(q_TNH, k_PKSH, codes=("int8",), value_dim=value_dim),
    }
    chosen = contract.choose("paged_prefill", implementation, refusals)
    attend = _implementation(chosen)
    latent = {} if value_dim is None else {"value_dim": value_dim}
    return attend(
        q_TNH, k_PKSH, v_PKSH, page_RM, work,
        scale=scale, window=window, soft_cap=soft_cap, sink_N=sink_N, **latent,
    )
