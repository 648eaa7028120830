"""Attention over the paged KV cache of one layer: writes the step's keys and values, then attends.

Knows pages, rows and the step's work items through `kernels_pallas`; knows no projection, norm or rope.
Invariant: padding tokens write nothing, and what a real token gets depends on its own row only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.core.model_spec import SlidingWindow, Span
from jaxserve.layers.context import LayerKv, StepContext
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.quantized import Pages, QuantizedPages


def attend(
    q_TNH: Array,
    k_TKH: Array,
    v_TKH: Array | None,
    layer_kv: LayerKv,
    context: StepContext,
    group: int,
    *,
    scale: float,
    span: Span,
    soft_cap: float | None = None,
    sink_N: Array | None = None,
    value_dim: int | None = None,
    implementation: str | None = None,
    has_prefill: bool = True,
) -> tuple[Array, LayerKv]:
    """Attention output of every token (zero for padding) and the layer's pages with the step's tokens in them.

    Args:
      v_TKH: None where the keys are the values too (latent attention); the cache then has keys only.
      group: which KV group, hence which page table, the layer belongs to.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      sink_N: a logit a head that counts in the softmax's denominator and has no value.
      value_dim: without v_TKH, the first of a key's numbers that are its value, and the width of the output.
      implementation: who attends, see `kernels_pallas.paged_decode`; a model is built with
        `functools.partial(attend, implementation=...)` for another one, and refused with reasons where that cannot.
        Pages are written by XLA, and by Triton beside Triton's attention where they hold neither codes nor latents.
      has_prefill: False where every step is decodes only, one token an entry; then that section is not even traced,
        and of the work only the decodes' part is read. Decodes get the same bits.
    """
    page_RM = context.page_RM[group]
    window = span.size if isinstance(span, SlidingWindow) else None

    def write(pages_PKSH: Pages, new_TKH: Array) -> Pages:
        is_plain = v_TKH is not None and not isinstance(pages_PKSH, QuantizedPages)
        writer = "triton" if implementation == "triton" and is_plain else "xla"
        return kv_write(pages_PKSH, new_TKH, page_RM, context.row_T, context.position_T, implementation=writer)

    with jax.named_scope("attention.write"):
        k_PKSH = write(layer_kv.k_PKSH, k_TKH)
        has_values = v_TKH is not None and layer_kv.v_PKSH is not None
        v_PKSH = write(layer_kv.v_PKSH, v_TKH) if has_values else None
    q_TNH = q_TNH.astype(k_TKH.dtype)
    sections = []
    for name, section in (("decode", paged_decode), ("prefill", paged_prefill))[: 2 if has_prefill else 1]:
        with jax.named_scope(f"attention.{name}"):
            sections.append(section(
                q_TNH, k_PKSH, v_PKSH, page_RM, context.work,
                scale=scale, window=window, soft_cap=soft_cap, sink_N=sink_N, value_dim=value_dim,
                implementation=implementation,
            ))
    out_TNH = sections[0]       # zero for what is no decode
    if has_prefill:
        is_decode_T = jnp.arange(q_TNH.shape[0], dtype=jnp.int32) < context.work.decode_count
        out_TNH = jnp.where(is_decode_T[:, None, None], out_TNH, sections[1])
    return out_TNH, LayerKv(k_PKSH=k_PKSH, v_PKSH=v_PKSH)
