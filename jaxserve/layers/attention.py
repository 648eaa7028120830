"""Grouped-query attention without its core: fused projections, norms of heads, rope, and the way back to the stream.

Where keys and values live and who may see whom is the business of the injected `attend`
(`jaxserve.layers.paged.attend`, or a dense stand-in in tests).
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import Attention, HeadNorm, Span
from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import Normalise
from jaxserve.layers.rope import Rotation, rotate


class AttendPort(Protocol):
    """Writes a step's keys and values to a layer's cache and attends causally; see `layers.paged.attend`.

    Without values (None) the first `value_dim` numbers of a key are its value: the latent cache of MLA.
    """

    def __call__(
        self, q_TNH: Array, k_TKH: Array, v_TKH: Array | None, layer_kv: Any, context: Any, group: int, *,
        scale: float, span: Span, soft_cap: float | None, sink_N: Array | None, value_dim: int | None = None,
    ) -> tuple[Array, Any]: ...


class SelfAttention(nn.Module):
    """Rows of `qkv` are q, then k, then v, heads in order."""

    spec: Attention
    width: int
    dtype: DTypeLike
    attend: AttendPort

    def setup(self) -> None:
        spec, dtype = self.spec, self.dtype
        q_width, kv_width = spec.head_count * spec.head_dim, spec.kv_head_count * spec.head_dim
        self.qkv = Linear(self.width, q_width + 2 * kv_width, ("qkv", "width"), dtype, spec.has_qkv_bias)
        self.out = Linear(q_width, self.width, ("width", "heads"), dtype, spec.has_out_bias)
        if spec.head_norm is not None:
            norm, H = spec.head_norm, spec.head_dim
            self.q_norm = _head_norm(norm, spec.head_count, norm.query_count, H, "heads", dtype)
            self.k_norm = _head_norm(norm, spec.kv_head_count, norm.kv_count, H, "kv_heads", dtype)
        if spec.has_sinks:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
            self.sink_N = self.param("sinks", init, (spec.head_count,), dtype)

    def __call__(
        self, x_TD: Array, turn: Rotation | None, layer_kv: Any, context: Any, group: int
    ) -> tuple[Array, Any]:
        spec, T = self.spec, x_TD.shape[0]
        N, K, H = spec.head_count, spec.kv_head_count, spec.head_dim
        with jax.named_scope("attention.qkv"):
            qkv_TNH = self.qkv(x_TD).reshape(T, N + 2 * K, H)
            q_TNH, k_TKH, v_TKH = qkv_TNH[:, :N], qkv_TNH[:, N:N + K], qkv_TNH[:, N + K:]
        if spec.head_norm is not None:
            with jax.named_scope("attention.norm"):
                if spec.head_norm.over == "head":
                    q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
                else:
                    q_TNH = self.q_norm(q_TNH.reshape(T, N * H)).reshape(T, N, H)
                    k_TKH = self.k_norm(k_TKH.reshape(T, K * H)).reshape(T, K, H)
        if spec.qkv_clip is not None:
            clip = spec.qkv_clip
            q_TNH, k_TKH, v_TKH = (jnp.clip(x, -clip, clip) for x in (q_TNH, k_TKH, v_TKH))
        if spec.rope is not None and turn is not None:
            with jax.named_scope("attention.rope"):
                q_TNH, k_TKH = rotate(q_TNH, turn, spec.rope), rotate(k_TKH, turn, spec.rope)
        out_TNH, layer_kv = self.attend(
            q_TNH, k_TKH, v_TKH, layer_kv, context, group, scale=spec.scale, span=spec.span,
            soft_cap=spec.soft_cap, sink_N=self.sink_N if spec.has_sinks else None,
        )
        with jax.named_scope("attention.out"):
            return self.out(out_TNH.astype(self.dtype).reshape(T, N * H)), layer_kv


def _head_norm(
    spec: HeadNorm, heads: int, heads_whole: int | None, head_dim: int, axis: str, dtype: DTypeLike
) -> Normalise:
    if spec.over == "head":
        return Normalise(spec.norm, head_dim, dtype)
    return Normalise(spec.norm, heads * head_dim, dtype, axis, (heads_whole or heads) * head_dim)
