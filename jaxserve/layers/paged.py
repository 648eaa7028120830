"""Attention over the paged KV cache of one layer: writes the step's keys and values, then attends.

Knows pages, rows and the step's work items through `kernels_pallas`; knows no projection, norm or rope.
Invariant: padding tokens write nothing, and what a real token gets depends on its own row only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.layers.context import LayerKv, StepContext
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill


def attend(
    q_TNH: Array,
    k_TKH: Array,
    v_TKH: Array,
    layer_kv: LayerKv,
    context: StepContext,
    group: int,
    *,
    scale: float,
    window: int | None,
) -> tuple[Array, LayerKv]:
    """Attention output of every token (zero for padding) and the layer's pages with the step's tokens in them.

    Args:
      group: which KV group, hence which page table, the layer belongs to.
      window: newest positions a token sees, its own included; None is all.
    """
    page_RM = context.page_RM[group]
    with jax.named_scope("attention.write"):
        k_PKSH, v_PKSH = (
            kv_write(pages, new, page_RM, context.row_T, context.position_T, implementation="xla")
            for pages, new in ((layer_kv.k_PKSH, k_TKH), (layer_kv.v_PKSH, v_TKH))
        )
    q_TNH = q_TNH.astype(k_TKH.dtype)
    sections = []
    for name, section in (("decode", paged_decode), ("prefill", paged_prefill)):
        with jax.named_scope(f"attention.{name}"):
            sections.append(
                section(q_TNH, k_PKSH, v_PKSH, page_RM, context.work, scale=scale, window=window, implementation="xla")
            )
    decoded_TNH, prefilled_TNH = sections
    is_decode_T = jnp.arange(q_TNH.shape[0], dtype=jnp.int32) < context.work.decode_count
    out_TNH = jnp.where(is_decode_T[:, None, None], decoded_TNH, prefilled_TNH)
    return out_TNH, LayerKv(k_PKSH=k_PKSH, v_PKSH=v_PKSH)
