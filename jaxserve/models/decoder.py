"""The one decoder of all decoder-only families: reads a ModelSpec and computes it. Stateless; parameters come in.

Knows no family, no file and no page: what a layer computes is in its LayerSpec, where keys and values live is the
business of `attend`. Layers are unrolled, because a scan over stacked weights copies each layer's slice; but layers
of equal spec are traced and lowered once, through an inner jit.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxserve.core.model_spec import LayerSpec, ModelSpec
from jaxserve.layers import paged
from jaxserve.layers.attention import AttendPort, SelfAttention
from jaxserve.layers.context import LayerKv, StepContext
from jaxserve.layers.embedding import Vocabulary
from jaxserve.layers.mlp import GatedMlp
from jaxserve.layers.norm import RmsNorm
from jaxserve.layers.rope import Rotation, rotation
from jaxserve.sharding import rules


class Block(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    spec: LayerSpec
    width: int
    dtype: DTypeLike
    attend: AttendPort

    def setup(self) -> None:
        spec, width, dtype = self.spec, self.width, self.dtype
        self.attention_norm = RmsNorm(width, spec.norm_epsilon, dtype)
        self.attention = SelfAttention(spec.attention, width, dtype, self.attend)
        self.mlp_norm = RmsNorm(width, spec.norm_epsilon, dtype)
        self.mlp = GatedMlp(spec.mlp, width, dtype)

    def __call__(self, x_TD: Array, turn: Rotation, layer_kv: Any, context: Any, group: int) -> tuple[Array, Any]:
        attended_TD, layer_kv = self.attention(self.attention_norm(x_TD), turn, layer_kv, context, group)
        x_TD = x_TD + attended_TD
        return x_TD + self.mlp(self.mlp_norm(x_TD)), layer_kv


@functools.partial(jax.jit, static_argnames=("block", "group"))
def _block(
    params: Any, x_TD: Array, turn: Rotation, layer_kv: Any, context: Any, *, block: Block, group: int
) -> tuple[Array, Any]:
    """A block as a function of its parameters: equal blocks share one trace."""
    return block.apply({"params": params}, x_TD, turn, layer_kv, context, group)


class Decoder(nn.Module):
    """A decoder-only language model.

    Usage: `model.apply({"params": params}, token_T, kv, context, method="hidden")`, then
    `model.apply({"params": params}, hidden_BD, method="logits")` for the rows that sample.
    """

    spec: ModelSpec
    dtype: DTypeLike
    attend: AttendPort = paged.attend

    def setup(self) -> None:
        spec, dtype = self.spec, self.dtype
        self.embedding = Vocabulary(spec.vocab_size, spec.width, dtype)
        self.layers = [Block(layer, spec.width, dtype, self.attend) for layer in spec.layers]
        self.final_norm = RmsNorm(spec.width, spec.norm_epsilon, dtype)
        if not spec.is_tied:
            self.head = Vocabulary(spec.vocab_size, spec.width, dtype)

    def hidden(
        self, token_T: Array, kv: tuple[LayerKv, ...], context: StepContext
    ) -> tuple[Array, tuple[LayerKv, ...]]:
        """Hidden states after the final norm, and the cache with the step's keys and values in it."""
        with jax.named_scope("embed"):
            x_TD = self.embedding.embed(token_T)
        with jax.named_scope("rope"):
            ropes = dict.fromkeys(layer.attention.rope for layer in self.spec.layers)
            turns = {rope: rotation(rope, context.position_T) for rope in ropes}
        groups = {layer: index for index, group in enumerate(self.spec.kv_groups) for layer in group.layers}
        new_kv = []
        for index, (block, layer_kv) in enumerate(zip(self.layers, kv, strict=True)):
            turn = turns[block.spec.attention.rope]
            with jax.named_scope(f"layer_{index}"):
                if self.is_initializing():
                    x_TD, layer_kv = block(x_TD, turn, layer_kv, context, groups[index])
                else:
                    x_TD, layer_kv = _block(
                        block.variables["params"], x_TD, turn, layer_kv, context,
                        block=block.clone(parent=None, name=None), group=groups[index],
                    )
            new_kv.append(layer_kv)
        with jax.named_scope("final_norm"):
            return self.final_norm(x_TD), tuple(new_kv)

    def logits(self, hidden_BD: Array) -> Array:
        """Float32 logits [B, V]."""
        with jax.named_scope("logits"):
            return (self.embedding if self.spec.is_tied else self.head).logits(hidden_BD)

    def everything(self, token_T: Array, kv: Any, context: Any) -> Array:
        """Touches every parameter; for `abstract_params`."""
        hidden_TD, _ = self.hidden(token_T, kv, context)
        return self.logits(hidden_TD)


def abstract_params(spec: ModelSpec, dtype: DTypeLike, mesh: Mesh | None = None) -> dict[str, Any]:
    """The parameter tree as shapes, dtypes and, given a mesh, placements.

    It is *the* source for loading, dummy weights, memory planning and compiling.
    """
    context = StepContext(position_T=jnp.zeros(2, jnp.int32), row_T=None, page_RM=(), work=None)
    model = Decoder(spec=spec, dtype=dtype, attend=_no_attention)
    boxed = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros(2, jnp.int32), (None,) * len(spec.layers), context, method="everything"
        )
    )

    def place(box: meta.AxisMetadata) -> jax.ShapeDtypeStruct:
        value = box.value
        sharding = None if mesh is None else rules.sharding(mesh, box.names)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return jax.tree.map(place, boxed["params"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))


def _no_attention(q_TNH: Array, k_TKH: Array, v_TKH: Array, layer_kv: Any, *_: Any, **__: Any) -> tuple[Array, Any]:
    return q_TNH, layer_kv
