"""Sampling and scoring of one step, as pure functions: hidden states in, tokens, logprobs and new row state out.

Knows which rows sample, not how a distribution is shaped (`sampling` does).
Invariant: a row that is not in the step, or whose prompt is unfinished, keeps its state; results are buffers of their
own and never donated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models.decoder import Decoder
from jaxserve.runner import sampling
from jaxserve.runner.forward import Sampling
from jaxserve.runner.sampling import RowState

SCORE_ROWS = 64     # positions scored at once: their logits are the program's largest temporary


class LogprobResult(NamedTuple):
    """Of one token a row (or packed position), with alternatives, most likely first."""

    logprob_B: Array
    rank_B: Array
    top_id_BX: Array
    top_logprob_BX: Array


class SampleResult(NamedTuple):
    """What goes back to the host; `logprobs` are zeros where no row wants them."""

    token_B: Array
    is_finite_B: Array
    logprobs: LogprobResult | None


def sample_step(
    leaves: Sequence[Array],
    step: Sampling,
    rows: RowState,
    *,
    model: Decoder,
    tree: Any,
    count: int,
    alternatives: int,
    mode: str,
) -> tuple[RowState, SampleResult]:
    """Samples one token for each of the first `count` rows of `step`."""
    row_B, position_B = step.row_B[:count], step.position_B[:count]
    logits_BV = _logits(model, tree, leaves, step.hidden_BD[:count])
    shaped_BV = sampling.shape_logits(logits_BV, rows, row_B, position_B)
    token_B = sampling.sample(shaped_BV, rows, row_B, position_B)
    logprobs = jax.lax.cond(
        step.wants_logprobs > 0,
        lambda: LogprobResult(*sampling.logprobs(shaped_BV if mode.startswith("p") else logits_BV, token_B, alternatives)),
        lambda: _no_logprobs(count, alternatives),
    )
    is_finite_B = jnp.isfinite(logits_BV).all(-1)
    return sampling.advance(rows, row_B, token_B), SampleResult(token_B, is_finite_B, logprobs)


def score_step(
    leaves: Sequence[Array], hidden_TD: Array, target_T: Array, *, model: Decoder, tree: Any, alternatives: int
) -> LogprobResult:
    """Logprobs of `target_T` after each packed position; positions whose target is -1 cost nothing and give zeros.

    Works in slabs of SCORE_ROWS positions: the logits of a whole chunk at once would dwarf the rest of the step.
    """
    tokens, width = hidden_TD.shape
    slab = min(SCORE_ROWS, tokens)
    slabs = -(-tokens // slab)
    padding = slabs * slab - tokens
    hidden_ZBD = jnp.pad(hidden_TD, ((0, padding), (0, 0))).reshape(slabs, slab, width)
    target_ZB = jnp.pad(target_T, (0, padding), constant_values=-1).reshape(slabs, slab)

    def score(of: tuple[Array, Array]) -> LogprobResult:
        hidden_BD, target_B = of

        def wanted() -> LogprobResult:
            logits_BV = _logits(model, tree, leaves, hidden_BD)
            return LogprobResult(*sampling.logprobs(logits_BV, jnp.maximum(target_B, 0), alternatives))

        return jax.lax.cond((target_B >= 0).any(), wanted, lambda: _no_logprobs(slab, alternatives))

    scored = jax.lax.map(score, (hidden_ZBD, target_ZB))
    return jax.tree.map(lambda array: array.reshape(slabs * slab, *array.shape[2:])[:tokens], scored)


def logprob_structure() -> LogprobResult:
    """A LogprobResult of no arrays, for what only needs its structure."""
    return LogprobResult(0, 0, 0, 0)  # type: ignore[arg-type]


def sample_structure() -> SampleResult:
    """Likewise a SampleResult."""
    return SampleResult(0, 0, logprob_structure())  # type: ignore[arg-type]


def _logits(model: Decoder, tree: Any, leaves: Sequence[Array], hidden_BD: Array) -> Array:
    return model.apply({"params": jax.tree.unflatten(tree, leaves)}, hidden_BD, method="logits")


def _no_logprobs(count: int, alternatives: int) -> LogprobResult:
    zero_B, zero_BX = jnp.zeros(count), jnp.zeros((count, alternatives))
    return LogprobResult(zero_B, zero_B.astype(jnp.int32), zero_BX.astype(jnp.int32), zero_BX)
