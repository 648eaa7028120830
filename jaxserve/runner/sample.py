"""Sampling and scoring of one step, as pure functions: hidden states in, tokens, logprobs and new row state out.

Knows which rows sample, not how a distribution is shaped and drawn from (`sampling` does).
Invariant: a row that is not in the step, or whose prompt is unfinished, keeps its state; results are buffers of their
own and never donated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.decoder import Decoder
from jaxserve.runner.forward import Sampling
from jaxserve.runner.row_state import RowState, advance
from jaxserve.runner.sampling import Logprobs, LogprobsMode, Sampled, logprobs, no_logprobs, sample_rows

SCORE_ROWS = 64     # positions scored at once: their logits are the program's largest temporary


def head_params(params: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The parameters that logits need: a call's host time grows with its arguments."""
    name = "embedding" if spec.is_tied else "head"
    return {name: params[name]}


def sample_step(
    leaves: Sequence[Array],
    step: Sampling,
    rows: RowState,
    *,
    model: Decoder,
    tree: Any,
    count: int,
    alternatives: int,
    mode: LogprobsMode,
) -> tuple[RowState, Sampled]:
    """Samples one token for each of the first `count` rows of `step`; leaves and tree are those of `head_params`."""
    row_B, position_B = step.row_B[:count], step.position_B[:count]
    logits_BV = _logits(model, tree, leaves, step.hidden_BD[:count])
    sampled = sample_rows(logits_BV, rows, row_B, position_B, mode=mode, alternatives=alternatives)
    return advance(rows, row_B, sampled.token_B), sampled


def score_step(
    leaves: Sequence[Array], hidden_TD: Array, target_T: Array, *, model: Decoder, tree: Any, alternatives: int
) -> Logprobs:
    """Logprobs of `target_T` after each packed position; slabs without a target (-1) cost nothing and give zeros.

    Works in slabs of SCORE_ROWS positions: the logits of a whole chunk at once would dwarf the rest of the step.
    """
    tokens, width = hidden_TD.shape
    slab = min(SCORE_ROWS, tokens)
    slabs = -(-tokens // slab)
    padding = slabs * slab - tokens
    hidden_ZBD = jnp.pad(hidden_TD, ((0, padding), (0, 0))).reshape(slabs, slab, width)
    target_ZB = jnp.pad(target_T, (0, padding), constant_values=-1).reshape(slabs, slab)

    def score(of: tuple[Array, Array]) -> Logprobs:
        hidden_BD, target_B = of
        return jax.lax.cond(
            (target_B >= 0).any(),
            lambda: logprobs(_logits(model, tree, leaves, hidden_BD), jnp.maximum(target_B, 0), alternatives),
            lambda: no_logprobs(slab, alternatives),
        )

    scored = jax.lax.map(score, (hidden_ZBD, target_ZB))
    return jax.tree.map(lambda array: array.reshape(slabs * slab, *array.shape[2:])[:tokens], scored)


def _logits(model: Decoder, tree: Any, leaves: Sequence[Array], hidden_BD: Array) -> Array:
    return model.apply({"params": jax.tree.unflatten(tree, leaves)}, hidden_BD, method="logits")
