"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in absorbed form, over a cache of latents.

A token leaves one vector in the cache: its normalised latent and a rotated key that all heads share. Each head's
query is multiplied into the latent space (W_uk absorbed), all heads attend to the one cached head, and what they
get, a mixture of latents, is read out by W_uv. Where the cache lives is the business of the injected `attend`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import LatentAttention
from jaxserve.layers.attention import AttendPort
from jaxserve.layers.linear import Linear, precision_of
from jaxserve.layers.norm import Normalise
from jaxserve.layers.rope import Rotation, rotate


class LatentSelfAttention(nn.Module):
    """Rows of `latent` are the latent, then the shared key; of `query` the heads, each its plain, then its turning
    part. `key_up` and `value_up` are [N, plain, latent] and [N, value, latent]."""

    spec: LatentAttention
    width: int
    dtype: DTypeLike
    attend: AttendPort

    def setup(self) -> None:
        spec, dtype = self.spec, self.dtype
        q_width = spec.head_count * (spec.plain_dim + spec.rope_dim)
        if spec.query_rank is not None:
            self.query_down = Linear(self.width, spec.query_rank, ("latent", "width"), dtype, spec.has_bias)
            self.query_norm = Normalise(spec.norm, spec.query_rank, dtype)
        self.query = Linear(spec.query_rank or self.width, q_width, ("heads", "width"), dtype)
        self.latent = Linear(self.width, spec.latent_dim + spec.rope_dim, ("latent", "width"), dtype, spec.has_bias)
        self.latent_norm = Normalise(spec.norm, spec.latent_dim, dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("heads", None, "latent"))
        self.key_up_NHI = self.param("key_up", init, (spec.head_count, spec.plain_dim, spec.latent_dim), dtype)
        self.value_up_NHI = self.param("value_up", init, (spec.head_count, spec.value_dim, spec.latent_dim), dtype)
        self.out = Linear(spec.head_count * spec.value_dim, self.width, ("width", "heads"), dtype, spec.has_bias)

    def __call__(
        self, x_TD: Array, turn: Rotation | None, layer_kv: Any, context: Any, group: int
    ) -> tuple[Array, Any]:
        spec, T, N = self.spec, x_TD.shape[0], self.spec.head_count
        assert turn is not None, "latent attention turns its keys"
        with jax.named_scope("attention.query"):
            if spec.query_rank is not None:
                x_q_TD = self.query_norm(self.query_down(x_TD))
            else:
                x_q_TD = x_TD
            q_TNH = self.query(x_q_TD).reshape(T, N, spec.plain_dim + spec.rope_dim)
            plain_TNH, turning_TNH = q_TNH[..., : spec.plain_dim], q_TNH[..., spec.plain_dim :]
            q_TNH = jnp.concatenate(
                [self._to_latent(plain_TNH), rotate(turning_TNH, turn, spec.rope)], axis=-1
            )
        with jax.named_scope("attention.latent"):
            latent_TH = self.latent(x_TD)
            shared_T1H = rotate(latent_TH[:, None, spec.latent_dim :], turn, spec.rope)
            k_T1H = jnp.concatenate([self.latent_norm(latent_TH[:, : spec.latent_dim])[:, None], shared_T1H], axis=-1)
        out_TNH, layer_kv = self.attend(
            q_TNH, k_T1H, None, layer_kv, context, group, scale=spec.scale, span=spec.span, soft_cap=None, sink_N=None,
            value_dim=spec.latent_dim,
        )
        with jax.named_scope("attention.out"):
            value_TNH = self._to_values(out_TNH.astype(self.dtype))
            return self.out(value_TNH.reshape(T, N * spec.value_dim)), layer_kv

    def _to_latent(self, q_TNH: Array) -> Array:
        q_TNI = jnp.einsum(
            "TNH,NHI->TNI", q_TNH, self.key_up_NHI, precision=precision_of(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return q_TNI.astype(self.dtype)

    def _to_values(self, mixed_TNI: Array) -> Array:
        value_TNH = jnp.einsum(
            "TNI,NHI->TNH", mixed_TNI, self.value_up_NHI, precision=precision_of(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return value_TNH.astype(self.dtype)
