"""Writes a step's new keys or values into pages, in place on a donated pool.

Contract: token t goes to slot `position % S` of page `page_RM[row, position // S]`. Tokens whose row is R (padding) or
whose page is outside the pool are dropped. No two real tokens of a step share a slot.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kernels_pallas import contract, quantized
from kernels_pallas.kv_write import reference, xla
from kernels_pallas.quantized import Pages, QuantizedPages


def _implementation(name: str) -> Callable[..., Pages]:
    if name == "triton":
        from kernels_pallas.kv_write import triton  # late: jax warns on import that it is deprecated

        return triton.kv_write
    return {"xla": xla.kv_write, "reference": reference.kv_write}[name]


def kv_write(
    pages: Pages,
    x_TKH: Array,
    page_RM: Array,
    row_T: Array,
    position_T: Array,
    *,
    implementation: str | None = None,
) -> Pages:
    """The pool with the tokens written.

    Args:
      pages: the pool [P, K, S, H]; uint16 holds the bits of a 16-bit float (see `storage`), and into `QuantizedPages`
        tokens go as codes and scales.
      x_TKH: keys or values of the packed tokens, in the dtype the pool stands for, or any where that is codes.
      implementation: "xla", "reference", "triton" (GPUs), or None for the first that serves the request.
    """
    T, K, H = x_TKH.shape
    _, page_K, _, page_H = pages.shape
    violations = quantized.violations(pages) if isinstance(pages, QuantizedPages) else []
    if (page_K, page_H) != (K, H):
        violations.append(f"tokens have {K} heads of {H}, the pages {page_K} of {page_H}")
    if row_T.shape != (T,) or position_T.shape != (T,):
        violations.append(f"rows and positions must be ({T},), got {row_T.shape} and {position_T.shape}")
    for name, array in (("page table", page_RM), ("rows", row_T), ("positions", position_T)):
        if array.dtype != jnp.int32:
            violations.append(f"{name} must be int32, got {array.dtype}")
    contract.require("kv_write", violations)
    refusals = {
        "xla": lambda: contract.dtype_refusals(x_TKH, pages),
        "reference": lambda: contract.dtype_refusals(x_TKH, pages),
        "triton": lambda: contract.triton_refusals(x_TKH, pages),
    }
    chosen = contract.choose("kv_write", implementation, refusals)
    return _implementation(chosen)(pages, x_TKH, page_RM, row_T, position_T)
