"""From logits to tokens and logprobs: what the sample program computes for the rows of a step.

Order, as vLLM's: raw logprobs, then `shaping` (allowed ids, bad words, min-tokens, bias, penalties, temperature,
min-p, top-k, top-p), then the draw. Reads row state and leaves writing it to `row_state`.
Invariant: a row's token depends on its logits, settings and key (seed, choice, position, purpose) only: not on the
batch, its padding or the row's number.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.runner import vocab
from jaxserve.runner.row_state import RowSettings, RowState
from jaxserve.runner.shaping import gather_settings, needs_shaping, restrict, shape_logits

# Rows to work on at once on CPUs: 8 x 49,152 float32 stay near the cores, 64 do not, and every search passes over its
# rows some fifteen times (64 rows at temperature 1: 5 ms instead of 20, with top-p 25 instead of 55).
ROWS_TOGETHER = 8
SAMPLE = 0      # purposes of a key: what the random numbers of one position are for

LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]


class Logprobs(NamedTuple):
    """Of one token a row, with its best alternatives, most likely first."""

    logprob_B: Array
    rank_B: Array
    top_id_BX: Array
    top_logprob_BX: Array


class Sampled(NamedTuple):
    """One token a row. `logprobs` are zeros where no row of the step wants any."""

    token_B: Array
    is_finite_B: Array
    logprobs: Logprobs


def sample_rows(
    logits_BV: Array, rows: RowState, row_B: Array, position_B: Array, *, mode: LogprobsMode, alternatives: int,
    together: int | None = None,
) -> Sampled:
    """The whole of sampling; what no row asks for is not computed.

    Args:
      row_B: R for padding.  position_B: the position that the sampled token will take.
      mode: what the logprobs are of.  alternatives: X, how many each row brings.
      together: rows worked on at once, at most; None: all. Every group waits for its own conditions.
    """
    B = row_B.shape[0]
    together = B if together is None else math.gcd(B, together)

    def sample_group(of: tuple[Array, Array, Array]) -> Sampled:
        return _sample_group(of[0].astype(jnp.float32), rows, of[1], of[2], mode, alternatives)

    grouped = jax.tree.map(
        lambda array: array.reshape(B // together, together, *array.shape[1:]), (logits_BV, row_B, position_B)
    )
    sampled = lax.map(sample_group, grouped)
    return jax.tree.map(lambda array: array.reshape(B, *array.shape[2:]), sampled)


def _sample_group(
    logits_BV: Array, rows: RowState, row_B: Array, position_B: Array, mode: LogprobsMode, alternatives: int
) -> Sampled:
    settings = gather_settings(rows, row_B)
    if mode.startswith("raw"):
        # The shaped logits need not outlive their branch, and greedy rows never make any.
        is_plain = ~(needs_shaping(settings, position_B) | (settings.temperature_R > 0)).any()
        token_B = lax.cond(
            is_plain,
            lambda: vocab.argmax(logits_BV),
            lambda: sample(shape_logits(logits_BV, rows, row_B, position_B), rows, row_B, position_B),
        )
        of_BV = logits_BV
    else:
        of_BV = restrict(shape_logits(logits_BV, rows, row_B, position_B), settings)
        token_B = _choose(of_BV, settings, position_B)
    is_normalised = mode.endswith("logprobs")
    found = lax.cond(
        settings.has_logprobs_R.any(),
        lambda: logprobs(of_BV, token_B, alternatives, is_normalised=is_normalised),
        lambda: no_logprobs(row_B.shape[0], alternatives),
    )
    return Sampled(token_B=token_B, is_finite_B=is_finite(logits_BV), logprobs=found)


def sample(shaped_BV: Array, rows: RowState, row_B: Array, position_B: Array) -> Array:
    """[B] a token a row from shaped logits: the first maximum where greedy, else a draw.

    A row whose every token is masked gives token 0.
    """
    settings = gather_settings(rows, row_B)
    return _choose(restrict(shaped_BV.astype(jnp.float32), settings), settings, position_B)


def logprobs(logits_BV: Array, token_B: Array, alternatives: int, *, is_normalised: bool = True) -> Logprobs:
    """Logprob and rank of a token a row, and of the row's best tokens.

    `rank` counts the tokens at least as likely, so the best has rank 1. Not normalised, values are the logits.
    """
    with jax.named_scope("sample.logprobs"):
        logits_BV = logits_BV.astype(jnp.float32)
        zero_B = jnp.zeros(logits_BV.shape[0])
        top_B, log_sum_B = vocab.top_and_log_sum(logits_BV) if is_normalised else (zero_B, zero_B)
        of_token_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], 1)
        is_above_BWS = vocab.blocks(logits_BV, -jnp.inf) >= of_token_B1[:, :, None]
        rank_B = is_above_BWS.astype(jnp.float32).sum(-1).sum(-1).astype(jnp.int32)
        value_BX, top_id_BX = vocab.top(logits_BV, alternatives)
        return Logprobs(
            logprob_B=of_token_B1[:, 0] - top_B - log_sum_B,
            rank_B=jnp.minimum(rank_B, logits_BV.shape[1]),     # a masked token also meets the blocks' filling
            top_id_BX=top_id_BX.astype(jnp.int32),
            top_logprob_BX=value_BX - top_B[:, None] - log_sum_B[:, None],
        )


def no_logprobs(count: int, alternatives: int) -> Logprobs:
    """Zeros, where nobody asked."""
    zero_BX = jnp.zeros((count, alternatives), jnp.float32)
    return Logprobs(
        logprob_B=jnp.zeros(count, jnp.float32),
        rank_B=jnp.zeros(count, jnp.int32),
        top_id_BX=zero_BX.astype(jnp.int32),
        top_logprob_BX=zero_BX,
    )


def is_finite(logits_BV: Array) -> Array:
    """[B] False where a row holds NaN or +inf, or nothing but -inf. The maximum tells all three on GPUs; a CPU's vector
    instructions let a NaN go by, depending on where it lies, so there they are looked for.
    """
    x_BV = logits_BV.astype(jnp.float32)

    def by_maximum() -> Array:
        return jnp.isfinite(vocab.row_max(x_BV))

    return lax.platform_dependent(default=by_maximum, cpu=lambda: by_maximum() & ~vocab.has_nan(x_BV))


def uniform(settings: RowSettings, position_B: Array, *, purpose: int, count: int) -> Array:
    """[B, count] numbers in [0, 1), a function of seed, choice, position and purpose alone."""
    with jax.named_scope("sample.keys"):
        def of_row(high: Array, low: Array, choice: Array, position: Array) -> Array:
            key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
            for part in (choice, position, jnp.uint32(purpose)):
                key = jax.random.fold_in(key, part)
            return jax.random.uniform(key, (count,))

        return jax.vmap(of_row)(settings.seed_high_R, settings.seed_low_R, settings.choice_R, position_B)


def _choose(restricted_BV: Array, settings: RowSettings, position_B: Array) -> Array:
    is_greedy_B = settings.temperature_R == 0
    with jax.named_scope("sample.choose"):
        best_B = vocab.argmax(restricted_BV)
        return lax.cond(
            is_greedy_B.all(),
            lambda: best_B,
            lambda: jnp.where(
                is_greedy_B,
                best_B,
                vocab.draw(restricted_BV, uniform(settings, position_B, purpose=SAMPLE, count=2)),
            ),
        )
