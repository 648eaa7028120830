"""Grouped-query attention without its core: fused projections, rope, and the way back to the residual stream.

Where keys and values live and who may see whom is the business of the injected `attend`
(`jaxserve.layers.paged.attend`, or a dense stand-in in tests).
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import Attention, SlidingWindow
from jaxserve.layers.linear import Linear
from jaxserve.layers.rope import Rotation, rotate


class AttendPort(Protocol):
    """Writes a step's keys and values to a layer's cache and attends causally; see `layers.paged.attend`."""

    def __call__(
        self, q_TNH: Array, k_TKH: Array, v_TKH: Array, layer_kv: Any, context: Any, group: int, *,
        scale: float, window: int | None,
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
        self.qkv = Linear(self.width, q_width + 2 * kv_width, ("heads", "width"), dtype, spec.has_qkv_bias)
        self.out = Linear(q_width, self.width, ("width", "heads"), dtype, spec.has_out_bias)

    def __call__(self, x_TD: Array, turn: Rotation, layer_kv: Any, context: Any, group: int) -> tuple[Array, Any]:
        spec, T = self.spec, x_TD.shape[0]
        N, K, H = spec.head_count, spec.kv_head_count, spec.head_dim
        with jax.named_scope("attention.qkv"):
            qkv_TNH = self.qkv(x_TD).reshape(T, N + 2 * K, H)
            q_TNH, k_TKH, v_TKH = qkv_TNH[:, :N], qkv_TNH[:, N:N + K], qkv_TNH[:, N + K:]
        with jax.named_scope("attention.rope"):
            q_TNH, k_TKH = rotate(q_TNH, turn), rotate(k_TKH, turn)
        window = spec.span.size if isinstance(spec.span, SlidingWindow) else None
        out_TNH, layer_kv = self.attend(
            q_TNH, k_TKH, v_TKH, layer_kv, context, group, scale=spec.scale, window=window
        )
        with jax.named_scope("attention.out"):
            return self.out(out_TNH.astype(self.dtype).reshape(T, N * H)), layer_kv
