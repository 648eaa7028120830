"""The dense MLPs. Gate and up are one product over fused weights: one pass over x, one launch."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import Activation, GatedMlp, PlainMlp
from jaxserve.layers.linear import Linear

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
        act = ACTIVATIONS[self.spec.activation]
        if isinstance(self.spec, GatedMlp):
            with jax.named_scope("mlp.gate_up"):
                # In float32: more exact than rounding at each step, and on a CPU, where rounding is dear, faster.
                gate_TF, up_TF = jnp.split(self.gate_up(x_TD).astype(jnp.float32), 2, axis=-1)
                hidden_TF = (act(gate_TF) * up_TF).astype(self.dtype)
        else:
            with jax.named_scope("mlp.up"):
                hidden_TF = act(self.up(x_TD).astype(jnp.float32)).astype(self.dtype)
        with jax.named_scope("mlp.down"):
            return self.down(hidden_TF)
