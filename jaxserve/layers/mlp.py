"""The dense MLPs. Gate and up are one product over fused weights: one pass over x, one launch."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import Activation, GatedMlp, PlainMlp
from jaxserve.layers.linear import Linear, matmul
from jaxserve.quantization.qtensor import QTensor
from kernels_pallas.native import api as native

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class DenseMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with rows of `gate_up` gate, then up; or down(act(up(x)))."""

    spec: GatedMlp | PlainMlp
    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        spec, has_bias, dtype = self.spec, self.spec.has_bias, self.dtype
        if isinstance(spec, GatedMlp):
            self.gate_up = Linear(self.width, 2 * spec.width, ("gate_up", "width"), dtype, has_bias)
        else:
            self.up = Linear(self.width, spec.width, ("mlp", "width"), dtype, has_bias)
        self.down = Linear(spec.width, self.width, ("width", "mlp"), dtype, has_bias)

    def __call__(self, x_TD: Array) -> Array:
        if isinstance(self.spec, GatedMlp):
            with jax.named_scope("mlp.gate_up"):
                hidden_TF = self._gated(x_TD)
        else:
            with jax.named_scope("mlp.up"):
                hidden_TF = ACTIVATIONS[self.spec.activation](self.up(x_TD).astype(jnp.float32)).astype(self.dtype)
        with jax.named_scope("mlp.down"):
            return self.down(hidden_TF)

    def _gated(self, x_TD: Array) -> Array:
        """act(gate(x)) * up(x)."""
        spec, weight_OI = self.spec, self.gate_up.weight_OI
        if (
            isinstance(weight_OI, QTensor) or spec.has_bias or x_TD.dtype != weight_OI.dtype
            or not native.serves_gated(weight_OI.dtype, spec.width, spec.activation)
        ):
            return self._activated(self.gate_up(x_TD))
        return jax.lax.platform_dependent(
            x_TD, weight_OI, cpu=lambda x_TD, weight_OI: native.matmul_gated(x_TD, weight_OI, spec.activation),
            default=lambda x_TD, weight_OI: self._activated(matmul(x_TD, weight_OI).astype(self.dtype)),
        )

    def _activated(self, gate_up_TO: Array) -> Array:
        # In float32: more exact than rounding at each step, and on a CPU, where rounding is dear, faster.
        gate_TF, up_TF = jnp.split(gate_up_TO.astype(jnp.float32), 2, axis=-1)
        return (ACTIVATIONS[self.spec.activation](gate_TF) * up_TF).astype(self.dtype)
