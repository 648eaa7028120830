"""Root-mean-square normalisation. Computed in float32 whatever the input: a mean of squares in bfloat16 is 8 bits."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class RmsNorm(nn.Module):
    """x / rms(x) * weight, over the last axis."""

    width: int
    epsilon: float
    dtype: DTypeLike

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("width",))
        self.weight_D = self.param("weight", init, (self.width,), self.dtype)

    def __call__(self, x_TD: Array) -> Array:
        x32_TD = x_TD.astype(jnp.float32)
        mean_square_T1 = jnp.mean(jnp.square(x32_TD), axis=-1, keepdims=True)
        normed_TD = x32_TD * jax.lax.rsqrt(mean_square_T1 + self.epsilon)
        return (normed_TD * self.weight_D.astype(jnp.float32)).astype(self.dtype)
