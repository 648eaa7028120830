"""The gated MLP. Gate and up are one product over fused weights: one pass over x, one launch."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import DenseMlp
from jaxserve.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)); rows of `gate_up` are gate, then up."""

    spec: DenseMlp
    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        spec, has_bias, dtype = self.spec, self.spec.has_bias, self.dtype
        self.gate_up = Linear(self.width, 2 * spec.width, ("mlp", "width"), dtype, has_bias)
        self.down = Linear(spec.width, self.width, ("width", "mlp"), dtype, has_bias)

    def __call__(self, x_TD: Array) -> Array:
        with jax.named_scope("mlp.gate_up"):
            gate_TF, up_TF = jnp.split(self.gate_up(x_TD), 2, axis=-1)
            hidden_TF = ACTIVATIONS[self.spec.activation](gate_TF) * up_TF
        with jax.named_scope("mlp.down"):
            return self.down(hidden_TF)
