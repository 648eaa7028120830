"""The vocabulary's two ends: token ids to the residual stream, and hidden states to logits.

Invariant: logits are float32 sums, never rounded to a smaller type first; ids are checked on the host, not here.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.layers.linear import matmul, matrix
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding import collectives


class Vocabulary(nn.Module):
    """A [V, D] matrix that embeds ids, scores hidden states, or both (tied weights); or that of learned positions."""

    size: int
    width: int
    dtype: DTypeLike
    has_bias: bool = False
    axis: str = "vocab"

    def setup(self) -> None:
        self.weight_VD = matrix(self, (self.size, self.width), (self.axis, "width"), self.dtype)
        if self.has_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
            self.bias_V = self.param("bias", init, (self.size,), self.dtype)

    def embed(self, id_T: Array) -> Array:
        if collectives.part_count(self.axis) == 1:
            return self._rows(id_T)
        id_T = id_T - collectives.part(self.axis) * self.size
        is_here_T = (id_T >= 0) & (id_T < self.size)
        x_TD = jnp.where(is_here_T[:, None], self._rows(jnp.where(is_here_T, id_T, 0)), 0)
        return collectives.total(x_TD, self.axis, self.dtype)

    def _rows(self, id_T: Array) -> Array:
        if isinstance(self.weight_VD, QTensor):
            return self.weight_VD.take(id_T).astype(self.dtype)
        # "clip" spares the compare-and-fill of the default mode; ids are in range.
        return jnp.take(self.weight_VD, id_T, axis=0, mode="clip")

    def logits(self, hidden_BD: Array) -> Array:
        logits_BV = matmul(hidden_BD, self.weight_VD)
        return logits_BV + self.bias_V.astype(jnp.float32) if self.has_bias else logits_BV
