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
from jaxserve.sharding import collectives

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
    vocab_size: int,
    alternatives: int,
    mode: LogprobsMode,
    tells_logprobs: bool = False,
    together: int | None = None,
) -> tuple[RowState, Sampled]:
    """Samples one token for each of the first `count` rows of `step`; leaves and tree are those of `head_params`.

    Several devices share out the rows: all know every token, each the logprobs of its own, unless it tells them too.
    """
    row_count = rows.last_token_R.shape[0]
    row_B = collectives.padded_rows(step.row_B[:count], "samples", row_count)
    position_B = collectives.padded_rows(step.position_B[:count], "samples")
    is_real_B1 = (step.row_B[:count] < row_count)[:, None]      # zeros cost native products nothing
    hidden_BD = jnp.where(is_real_B1, step.hidden_BD[:count], jnp.zeros((), step.hidden_BD.dtype))
    logits_BV = logits_of_own_rows(model, jax.tree.unflatten(tree, leaves), hidden_BD, vocab_size)
    own_row_B, own_position_B = (collectives.own_rows(x_B, "samples") for x_B in (row_B, position_B))
    sampled = sample_rows(
        logits_BV, rows, own_row_B, own_position_B, mode=mode, alternatives=alternatives, together=together
    )
    sampled = _told_to_all(sampled)
    if tells_logprobs:
        wants = rows.settings.has_logprobs_R.at[row_B].get(mode="fill", fill_value=False).any()
        sampled = sampled._replace(logprobs=_logprobs_of_all(sampled.logprobs, wants))
    return advance(rows, row_B, sampled.token_B), sampled


def _told_to_all(sampled: Sampled) -> Sampled:
    """With the tokens of every device's rows; one message tells both, for a token's complement is negative."""
    if collectives.part_count("samples") == 1:
        return sampled
    told_B = collectives.all_rows(jnp.where(sampled.is_finite_B, sampled.token_B, ~sampled.token_B), "samples")
    return sampled._replace(token_B=jnp.maximum(told_B, ~told_B), is_finite_B=told_B >= 0)


def _logprobs_of_all(found: Logprobs, wants: Array) -> Logprobs:
    """Every device's logprobs on each; all know alike whether anybody wants them."""
    count = collectives.part_count("samples")
    return jax.lax.cond(
        wants,
        lambda: jax.tree.map(lambda x_B: collectives.all_rows(x_B, "samples"), found),
        lambda: no_logprobs(found.logprob_B.shape[0] * count, found.top_id_BX.shape[1]),
    )


def score_step(
    leaves: Sequence[Array], hidden_TD: Array, target_T: Array, *, model: Decoder, tree: Any, vocab_size: int,
    alternatives: int, tells_logprobs: bool = False,
) -> Logprobs:
    """Logprobs of `target_T` after each packed position, in slabs [Z, B]; slabs without a target (-1) cost nothing and
    give zeros. Past T they mean nothing.

    A slab has SCORE_ROWS positions: the logits of a whole chunk at once would dwarf the rest of the step. Several
    devices share out the positions of a slab, and each keeps the logprobs of its own, unless it tells them too: with
    --max-logprobs -1 they are as large as the logits.
    """
    tokens, width = hidden_TD.shape
    devices = collectives.part_count("samples")
    params = jax.tree.unflatten(tree, leaves)
    slab = -(-min(SCORE_ROWS, tokens) // devices) * devices
    slabs = -(-tokens // slab)
    padding = slabs * slab - tokens
    hidden_ZBD = jnp.pad(hidden_TD, ((0, padding), (0, 0))).reshape(slabs, slab, width)
    target_ZB = jnp.pad(target_T, (0, padding), constant_values=-1).reshape(slabs, slab)

    def score(of: tuple[Array, Array]) -> Logprobs:
        hidden_BD, target_B = of
        own_target_B = collectives.own_rows(jnp.maximum(target_B, 0), "samples")
        found = jax.lax.cond(
            (target_B >= 0).any(),
            lambda: logprobs(logits_of_own_rows(model, params, hidden_BD, vocab_size), own_target_B, alternatives),
            lambda: no_logprobs(slab // devices, alternatives),
        )
        return jax.tree.map(lambda x_B: collectives.all_rows(x_B, "samples"), found) if tells_logprobs else found

    return jax.lax.map(score, (hidden_ZBD, target_ZB))


def logits_of_own_rows(model: Decoder, params: Any, hidden_BD: Array, vocab_size: int) -> Array:
    """Whole logits of the rows that are this device's: no device holds those of all rows."""
    hidden_BD = collectives.padded_rows(hidden_BD, "samples")
    logits_BV = model.apply({"params": params}, hidden_BD, method="logits")
    return collectives.rows_of_columns(logits_BV, "vocab", "samples")[:, :vocab_size]
