"""The forward of one step, as a pure function: packed step in, hidden states of the sampling rows and new pages out.

Knows no bucket policy and no sampling. Sampled tokens of the step before are fed back here, on the device, so the
host can plan a step before it has seen the one before.
Invariant: of the outputs only `hidden_TD` has a shape that depends on T; whatever follows compiles once for all T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.layers.context import LayerKv, StepContext
from jaxserve.models.decoder import Decoder, Turns, apply_layer
from jaxserve.runner.inputs import FED_BACK, PageUpdateArrays, StepLayout, unpack


class Sampling(NamedTuple):
    """What the sampler needs of a step, at the largest B.

    Attributes:
      hidden_BD: of the last token of each sampling row.  row_B: R for padding.  position_B: of the token to sample.
    """

    hidden_BD: Array
    row_B: Array
    position_B: Array


class ForwardResult(NamedTuple):
    """Outputs of `forward`; `kv` and `page_RM` take the place of the donated ones."""

    hidden_TD: Array
    sampling: Sampling
    kv: tuple[LayerKv, ...]
    page_RM: tuple[Array, ...]


class Begun(NamedTuple):
    """A step before its first layer.

    Attributes:
      token_B: packed index of the token that each sampling row continues.  row_B, position_B: see `Sampling`.
    """

    x_TD: Array
    turns: Turns
    context: StepContext
    token_B: Array
    row_B: Array
    position_B: Array


def forward(
    leaves: Sequence[Array],
    kv: tuple[LayerKv, ...],
    page_RM: tuple[Array, ...],
    last_token_R: Array,
    is_long_R: Array,
    packed_W: Array,
    *,
    model: Decoder,
    tree: Any,
    layout: StepLayout,
) -> ForwardResult:
    """One step of the model: `begin`, all layers, `finish`.

    Args:
      leaves, tree: the parameters, flat: walking a nested tree at every call costs more than the step's dispatch.
    """
    params = jax.tree.unflatten(tree, leaves)
    begun = begin(params, page_RM, last_token_R, is_long_R, packed_W, model=model, layout=layout)
    layers = tuple(range(len(model.spec.layers)))
    of_layers = [params[f"layers_{index}"] for index in layers]
    x_TD, kv = run_layers(of_layers, begun.x_TD, begun.turns, begun.context, kv, model=model, layers=layers)
    hidden_TD, sampling = finish(params, x_TD, begun.token_B, begun.row_B, begun.position_B, model=model)
    return ForwardResult(hidden_TD=hidden_TD, sampling=sampling, kv=kv, page_RM=begun.context.page_RM)


def begin(
    params: Any, page_RM: tuple[Array, ...], last_token_R: Array, is_long_R: Array, packed_W: Array, *,
    model: Decoder, layout: StepLayout,
) -> Begun:
    """Unpacks the step, updates the page tables, embeds."""
    with jax.named_scope("unpack"):
        step = unpack(packed_W, layout)
        page_RM = tuple(_update(table_RM, updates) for table_RM, updates in zip(page_RM, step.updates, strict=True))
        fed_back_T = last_token_R.at[step.row_T].get(mode="clip")
        token_T = jnp.where(step.token_T == FED_BACK, fed_back_T, step.token_T)
        is_long_T = None if model.spec.rope_switch is None else is_long_R.at[step.row_T].get(mode="clip")
    context = StepContext(
        position_T=step.position_T, row_T=step.row_T, page_RM=page_RM, work=step.work, is_long_T=is_long_T
    )
    x_TD, turns = model.apply({"params": params}, token_T, context, method="embed")
    # Padding begins as zeros and mostly stays so: native products leave such rows out.
    x_TD = jnp.where((step.row_T < last_token_R.shape[0])[:, None], x_TD, jnp.zeros((), x_TD.dtype))
    return Begun(x_TD, turns, context, step.sample_token_B, step.sample_row_B, step.sample_position_B)


def run_layers(
    params: Sequence[Any], x_TD: Array, turns: Turns, context: StepContext, kv: tuple[LayerKv, ...], *,
    model: Decoder, layers: Sequence[int],
) -> tuple[Array, tuple[LayerKv, ...]]:
    """Some layers after each other: their parameters and their caches, in order."""
    new_kv = []
    for index, of_layer, layer_kv in zip(layers, params, kv, strict=True):
        x_TD, layer_kv = apply_layer(model, index, of_layer, x_TD, turns, layer_kv, context)
        new_kv.append(layer_kv)
    return x_TD, tuple(new_kv)


def finish(
    params: Any, x_TD: Array, token_B: Array, row_B: Array, position_B: Array, *, model: Decoder
) -> tuple[Array, Sampling]:
    """The final norm, and what the sampler needs."""
    hidden_TD = model.apply({"params": params}, x_TD, method="finish")
    return hidden_TD, Sampling(hidden_BD=hidden_TD[token_B], row_B=row_B, position_B=position_B)


def _update(table_RM: Array, updates: PageUpdateArrays) -> Array:
    return table_RM.at[updates.row_U, updates.index_U].set(updates.page_U, mode="drop")
