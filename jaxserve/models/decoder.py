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

from jaxserve.core.model_spec import LatentAttention, LayerSpec, ModelSpec, MoeMlp
from jaxserve.core.rope import Rope as RopeSpec
from jaxserve.layers import paged
from jaxserve.layers.attention import AttendPort, SelfAttention
from jaxserve.layers.context import LayerKv, StepContext
from jaxserve.layers.embedding import Vocabulary
from jaxserve.layers.latent_attention import LatentSelfAttention
from jaxserve.layers.mlp import DenseMlp
from jaxserve.layers.moe import MixtureOfExperts
from jaxserve.layers.norm import Normalise
from jaxserve.layers.rope import Rotation, rotation
from jaxserve.quantization import packing as packing_of
from jaxserve.quantization.packing import Packing
from jaxserve.sharding import rules
from jaxserve.sharding.split import device_spec

Turns = tuple[Rotation | None, ...]


class Block(nn.Module):
    """One block: attention and an MLP, each added to the residual stream, in the order and with the norms of `spec`."""

    spec: LayerSpec
    width: int
    dtype: DTypeLike
    attend: AttendPort
    experts: str

    def setup(self) -> None:
        spec, width, dtype = self.spec, self.width, self.dtype
        if isinstance(spec.attention, LatentAttention):
            self.attention = LatentSelfAttention(spec.attention, width, dtype, self.attend)
        else:
            self.attention = SelfAttention(spec.attention, width, dtype, self.attend)
        if isinstance(spec.mlp, MoeMlp):
            self.mlp = MixtureOfExperts(spec.mlp, width, dtype, self.experts)
        else:
            self.mlp = DenseMlp(spec.mlp, width, dtype)
        self.attention_norm, self.mlp_norm, self.attention_out_norm, self.mlp_out_norm = (
            None if norm is None else Normalise(norm, width, dtype)
            for norm in (spec.norm, spec.mlp_norm, spec.out_norm, spec.mlp_out_norm)
        )

    def __call__(
        self, x_TD: Array, turn: Rotation | None, layer_kv: Any, context: Any, group: int
    ) -> tuple[Array, Any]:
        normed_TD = _apply(self.attention_norm, x_TD)
        attended_TD, layer_kv = self.attention(normed_TD, turn, layer_kv, context, group)
        attended_TD = self._scaled(_apply(self.attention_out_norm, attended_TD))
        if self.spec.order == "parallel":
            seen_TD = normed_TD if self.mlp_norm is None else self.mlp_norm(x_TD)
            return x_TD + attended_TD + self._scaled(_apply(self.mlp_out_norm, self.mlp(seen_TD))), layer_kv
        x_TD = x_TD + attended_TD
        return x_TD + self._scaled(_apply(self.mlp_out_norm, self.mlp(_apply(self.mlp_norm, x_TD)))), layer_kv

    def _scaled(self, x_TD: Array) -> Array:
        return x_TD if self.spec.residual_scale == 1 else x_TD * jnp.asarray(self.spec.residual_scale, x_TD.dtype)


def _apply(norm: Normalise | None, x_TD: Array) -> Array:
    return x_TD if norm is None else norm(x_TD)


@functools.partial(jax.jit, static_argnames=("block", "group"))
def _block(
    params: Any, x_TD: Array, turn: Rotation | None, layer_kv: Any, context: Any, *, block: Block, group: int
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
    experts: str = "xla"     # who multiplies a mixture's experts, see kernels_pallas.grouped_matmul

    def setup(self) -> None:
        spec, dtype = self.spec, self.dtype
        self.embedding = Vocabulary(spec.vocab_size, spec.width, dtype)
        self.layers = [Block(layer, spec.width, dtype, self.attend, self.experts) for layer in spec.layers]
        self.final_norm = Normalise(spec.final_norm, spec.width, dtype)
        if spec.positions is not None:
            count = spec.positions.count + spec.positions.offset
            self.positions = Vocabulary(count, spec.width, dtype, axis="position")
        if not spec.is_tied:
            self.head = Vocabulary(spec.vocab_size, spec.width, dtype, has_bias=spec.has_head_bias)

    def embed(self, token_T: Array, context: StepContext) -> tuple[Array, Turns]:
        """The residual stream before the first layer, and the rotation of each of `ropes(spec)`."""
        with jax.named_scope("embed"):
            x_TD = self.embedding.embed(token_T)
            if self.spec.embedding_scale != 1:
                x_TD = x_TD * jnp.asarray(self.spec.embedding_scale, x_TD.dtype)
            if self.spec.positions is not None:
                x_TD = x_TD + self.positions.embed(context.position_T + self.spec.positions.offset)
        with jax.named_scope("rope"):
            return x_TD, tuple(
                None if rope is None else rotation(rope, context.position_T, context.is_long_T)
                for rope in ropes(self.spec)
            )

    def finish(self, x_TD: Array) -> Array:
        """Hidden states after the final norm."""
        with jax.named_scope("final_norm"):
            return self.final_norm(x_TD)

    def hidden(
        self, token_T: Array, kv: tuple[LayerKv, ...], context: StepContext
    ) -> tuple[Array, tuple[LayerKv, ...]]:
        """Hidden states after the final norm, and the cache with the step's keys and values in it."""
        x_TD, turns = self.embed(token_T, context)
        new_kv = []
        for index, (block, layer_kv) in enumerate(zip(self.layers, kv, strict=True)):
            if self.is_initializing():
                turn = turns[ropes(self.spec).index(block.spec.attention.rope)]
                x_TD, layer_kv = block(x_TD, turn, layer_kv, context, 0)
            else:
                x_TD, layer_kv = apply_layer(self, index, block.variables["params"], x_TD, turns, layer_kv, context)
            new_kv.append(layer_kv)
        return self.finish(x_TD), tuple(new_kv)

    def logits(self, hidden_BD: Array) -> Array:
        """Float32 logits [B, V]."""
        with jax.named_scope("logits"):
            logits_BV = (self.embedding if self.spec.is_tied else self.head).logits(hidden_BD)
            if self.spec.logit_scale != 1:
                logits_BV = logits_BV * self.spec.logit_scale
            if self.spec.logit_cap is not None:
                logits_BV = self.spec.logit_cap * jnp.tanh(logits_BV / self.spec.logit_cap)
            return logits_BV

    def everything(self, token_T: Array, kv: Any, context: Any) -> Array:
        """Touches every parameter; for `abstract_params`."""
        hidden_TD, _ = self.hidden(token_T, kv, context)
        return self.logits(hidden_TD)


def ropes(spec: ModelSpec) -> tuple[RopeSpec | None, ...]:
    """The distinct rotations of a model, each computed once a step."""
    return tuple(dict.fromkeys(layer.attention.rope for layer in spec.layers))


def apply_layer(
    model: Decoder, index: int, params: Any, x_TD: Array, turns: Turns, layer_kv: Any, context: Any
) -> tuple[Array, Any]:
    """One layer as a function of its parameters."""
    spec, layer = model.spec, model.spec.layers[index]
    group = next(number for number, group in enumerate(spec.kv_groups) if index in group.layers)
    block = Block(layer, spec.width, model.dtype, model.attend, model.experts, parent=None)
    with jax.named_scope(f"layer_{index}"):
        turn = turns[ropes(spec).index(layer.attention.rope)]
        return _block(params, x_TD, turn, layer_kv, context, block=block, group=group)


def abstract_params(
    spec: ModelSpec, dtype: DTypeLike, mesh: Mesh | None = None, packing: Packing | None = None
) -> dict[str, Any]:
    """The parameter tree as shapes, dtypes and, given a mesh, placements; packed where `packing` says so.

    It is *the* source for loading, dummy weights, memory planning and compiling. On several devices an axis holds
    their parts one after the other (`sharding.split` says of which rows they are made). Raises ConfigError where
    the devices cannot share it.
    """
    boxed = _boxed_params(spec if mesh is None else device_spec(spec, mesh), dtype)

    def place(box: meta.AxisMetadata) -> jax.ShapeDtypeStruct:
        value = box.value
        if mesh is None:
            return jax.ShapeDtypeStruct(value.shape, value.dtype)
        shape = rules.joined_shape(mesh, box.names, value.shape)
        return jax.ShapeDtypeStruct(shape, value.dtype, sharding=rules.sharding(mesh, box.names))

    plain = jax.tree.map(place, boxed, is_leaf=_is_box)
    return packing_of.applied(plain, packing)


def logical_axes(spec: ModelSpec) -> list[tuple[str | None, ...]]:
    """The names of each parameter's axes, in the order of the tree's leaves."""
    return [box.names for box in jax.tree.leaves(_boxed_params(spec, jnp.float32), is_leaf=_is_box)]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _boxed_params(spec: ModelSpec, dtype: DTypeLike) -> Any:
    """Abstract parameters with the logical names of their axes."""
    context = StepContext(position_T=jnp.zeros(2, jnp.int32), row_T=None, page_RM=(), work=None)
    model = Decoder(spec=spec, dtype=dtype, attend=_no_attention)
    return jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros(2, jnp.int32), (None,) * len(spec.layers), context, method="everything"
        )
    )["params"]


def _no_attention(
    q_TNH: Array, k_TKH: Array, v_TKH: Array | None, layer_kv: Any, *_: Any, value_dim: int | None = None, **__: Any
) -> tuple[Array, Any]:
    return q_TNH[..., :value_dim], layer_kv
