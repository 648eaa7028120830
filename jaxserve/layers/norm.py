"""Normalisation over the last axis. Computed in float32 whatever the input: a mean in bfloat16 is 8 bits."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import LayerNorm, Norm, RmsNorm
from jaxserve.sharding import collectives
from kernels_pallas.native import api as native


class Normalise(nn.Module):
    """The norm that `spec` names, with its weight and, if any, its bias.

    Attributes:
      axis: logical name of what is normalised.  width_whole: its width over all devices, where several have parts.
    """

    spec: Norm
    width: int
    dtype: DTypeLike
    axis: str = "width"
    width_whole: int | None = None

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        self.weight_D = self.param("weight", init, (self.width,), self.dtype)
        if isinstance(self.spec, LayerNorm) and self.spec.has_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
            self.bias_D = self.param("bias", init, (self.width,), self.dtype)

    def __call__(self, x_TD: Array) -> Array:
        if isinstance(self.spec, RmsNorm) and self._is_native(x_TD):
            native_norm = partial(native.rms_norm, epsilon=self.spec.epsilon, offset=self.spec.offset)
            rows_TD = x_TD.reshape(-1, self.width)
            return jax.lax.platform_dependent(
                rows_TD, self.weight_D, cpu=native_norm, default=lambda x_TD, _: self._normed(x_TD)
            ).reshape(x_TD.shape)
        return self._normed(x_TD)

    def _is_native(self, x_TD: Array) -> bool:
        is_alike = x_TD.dtype == self.weight_D.dtype == self.dtype and collectives.part_count(self.axis) == 1
        return is_alike and x_TD.shape[-1] == self.width and native.serves_norm(self.dtype, self.width)

    def _normed(self, x_TD: Array) -> Array:
        x32_TD, weight_D = x_TD.astype(jnp.float32), self.weight_D.astype(jnp.float32)
        if isinstance(self.spec, RmsNorm):
            mean_square_T1 = self._mean_square(x32_TD)
            normed_TD = x32_TD * jax.lax.rsqrt(mean_square_T1 + self.spec.epsilon) * (weight_D + self.spec.offset)
        else:
            x32_TD = x32_TD - jnp.mean(x32_TD, axis=-1, keepdims=True)
            variance_T1 = jnp.mean(jnp.square(x32_TD), axis=-1, keepdims=True)
            normed_TD = x32_TD * jax.lax.rsqrt(variance_T1 + self.spec.epsilon) * weight_D
            if self.spec.has_bias:
                normed_TD = normed_TD + self.bias_D.astype(jnp.float32)
        return normed_TD.astype(self.dtype)

    def _mean_square(self, x_TD: Array) -> Array:
        if collectives.part_count(self.axis) == 1:
            return jnp.mean(jnp.square(x_TD), axis=-1, keepdims=True)
        total_T1 = collectives.total(jnp.sum(jnp.square(x_TD), axis=-1, keepdims=True), self.axis, jnp.float32)
        return total_T1 / (self.width_whole or self.width)
