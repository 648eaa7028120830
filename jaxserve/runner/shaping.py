"""From logits to what is sampled from, in vLLM's order: allowed ids, bad words, min-tokens, logit bias, penalties,
temperature, min-p, top-k, top-p.

Knows rows and logits; draws nothing. Every stage that a step does not need is skipped by `lax.cond` on the rows'
settings, so one program serves all.
Invariant: a row's result depends on that row alone, and a token once at -inf stays there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.runner.row_state import NO_STOP, RowSettings, RowState
from jaxserve.runner.threshold import kth_largest, least_of_mass
from jaxserve.runner.vocab import probabilities, row_max, row_min


def gather_settings(rows: RowState, row_B: Array) -> RowSettings:
    """The settings of the sampling rows; padding rows (R) read the last row's and are made to ask for nothing."""
    chosen = jax.tree.map(lambda value: value.at[row_B].get(mode="clip"), rows.settings)
    is_real_B = row_B < rows.last_token_R.shape[0]
    return chosen.replace(
        temperature_R=jnp.where(is_real_B, chosen.temperature_R, 0),
        min_tokens_R=jnp.where(is_real_B, chosen.min_tokens_R, 0),
        slot_R=jnp.where(is_real_B, chosen.slot_R, -1),
        has_logprobs_R=chosen.has_logprobs_R & is_real_B,
    )


def needs_shaping(settings: RowSettings, position_B: Array) -> Array:
    """[B] whether the row's logits change before temperature."""
    return (settings.slot_R >= 0) | _lacks_tokens(settings, position_B)


def shape_logits(logits_BV: Array, rows: RowState, row_B: Array, position_B: Array) -> Array:
    """Masks, bias and penalties, in float32; unchanged where no row of the step wants any.

    Args:
      position_B: the position that the token sampled now will take.
    """
    settings = gather_settings(rows, row_B)
    with jax.named_scope("sample.shape"):
        logits_BV = logits_BV.astype(jnp.float32)
        return lax.cond(
            needs_shaping(settings, position_B).any(),
            lambda: _shaped(logits_BV, rows, settings, row_B, position_B),
            lambda: logits_BV,
        )


def _shaped(logits_BV: Array, rows: RowState, settings: RowSettings, row_B: Array, position_B: Array) -> Array:
    lacks_B = _lacks_tokens(settings, position_B)
    logits_BV = lax.cond(
        lacks_B.any(), lambda x: _mask_stop_ids(x, settings.stop_id_RX, lacks_B), lambda x: x, logits_BV
    )
    return lax.cond(
        (settings.slot_R >= 0).any(), lambda x: _shape_by_slot(x, rows, settings, row_B), lambda x: x, logits_BV
    )


def _lacks_tokens(settings: RowSettings, position_B: Array) -> Array:
    return position_B - settings.prompt_length_R < settings.min_tokens_R


def _mask_stop_ids(logits_BV: Array, stop_id_BX: Array, lacks_B: Array) -> Array:
    token_BX = jnp.where(lacks_B[:, None], stop_id_BX, NO_STOP)
    b_BX = jnp.broadcast_to(jnp.arange(logits_BV.shape[0])[:, None], token_BX.shape)
    return logits_BV.at[b_BX, token_BX].set(-jnp.inf, mode="drop")


def _shape_by_slot(logits_BV: Array, rows: RowState, settings: RowSettings, row_B: Array) -> Array:
    """Bias (with what is not allowed at -inf), bad words and penalties of the rows that have a slot.

    Adding a finite bias to -inf leaves -inf, so masks and bias may share one addition.
    """
    has_slot_B = settings.slot_R >= 0
    slot_B = jnp.maximum(settings.slot_R, 0)
    shaped_BV = logits_BV + rows.slots.bias_YV[slot_B]

    # A bad word is due when the tokens before its last one are the newest of the output.
    word_BWJ = rows.slots.bad_word_YWJ[slot_B]
    history_BJ = rows.history_RJ.at[row_B].get(mode="clip")
    is_place_met_BWJ = (word_BWJ[:, :, :-1] == history_BJ[:, None, 1:]) | (word_BWJ[:, :, :-1] < 0)
    is_due_BW = is_place_met_BWJ.all(-1) & (word_BWJ[:, :, -1] >= 0)
    token_BW = jnp.where(is_due_BW, word_BWJ[:, :, -1], NO_STOP)
    b_BW = jnp.broadcast_to(jnp.arange(logits_BV.shape[0])[:, None], token_BW.shape)
    shaped_BV = shaped_BV.at[b_BW, token_BW].set(-jnp.inf, mode="drop")

    count_BV = rows.count_YV[slot_B]
    is_known_BV = (count_BV > 0) | rows.slots.is_prompt_YV[slot_B]
    repetition_BV = jnp.where(is_known_BV, settings.repetition_R[:, None], 1)
    shaped_BV = jnp.where(shaped_BV > 0, shaped_BV / repetition_BV, shaped_BV * repetition_BV)
    shaped_BV -= settings.frequency_R[:, None] * count_BV
    shaped_BV -= settings.presence_R[:, None] * (count_BV > 0)
    return jnp.where(has_slot_B[:, None], shaped_BV, logits_BV)


def restrict(logits_BV: Array, settings: RowSettings) -> Array:
    """Temperature, then min-p, top-k and top-p at -inf; greedy rows stay as they are.

    Ties: every token as likely as the last one kept is kept, for top-k as for top-p.
    """
    is_greedy_B = settings.temperature_R == 0
    with jax.named_scope("sample.restrict"):
        is_restricted_B = ~is_greedy_B & (
            (settings.min_p_R > 0) | _has_top_k(settings, logits_BV.shape[1]) | (settings.top_p_R < 1)
        )
        least = lax.cond(
            is_restricted_B.any(),
            lambda: _least_kept(logits_BV, settings, is_greedy_B),
            lambda: _Least(_nothing(is_greedy_B), _nothing(is_greedy_B)),
        )
        return _from(least, logits_BV, _tempered(logits_BV, settings, is_greedy_B))


class _Least(NamedTuple):
    """[B] each: what a token must reach to be kept; -inf keeps all.

    Top-k's is a logit before temperature: it is an entry, and a quotient rounded in another place need not be one.
    """

    logit_B: Array
    tempered_B: Array


def _least_kept(logits_BV: Array, settings: RowSettings, is_greedy_B: Array) -> _Least:
    """What min-p, top-k and top-p leave.

    Branches give a number a row and make of the logits what they need: a branch that gave logits would copy them
    where it changes none, 64 x 151,936 float32 in 39 MB and as many out.
    """
    def tempered() -> Array:
        return _tempered(logits_BV, settings, is_greedy_B)

    has_min_p_B = ~is_greedy_B & (settings.min_p_R > 0)
    has_top_k_B = ~is_greedy_B & _has_top_k(settings, logits_BV.shape[1])
    has_top_p_B = ~is_greedy_B & (settings.top_p_R < 1)
    nothing_B = _nothing(is_greedy_B)
    by_min_p_B = lax.cond(
        has_min_p_B.any(), lambda: _least_of_min_p(tempered(), settings.min_p_R, has_min_p_B), lambda: nothing_B
    )
    by_top_k_B = lax.cond(
        has_top_k_B.any(), lambda: _least_of_top_k(logits_BV, settings.top_k_R, has_top_k_B), lambda: nothing_B
    )
    before = _Least(by_top_k_B, by_min_p_B)
    by_top_p_B = lax.cond(
        has_top_p_B.any(),
        lambda: _least_of_top_p(_from(before, logits_BV, tempered()), settings.top_p_R, has_top_p_B),
        lambda: nothing_B,
    )
    return _Least(by_top_k_B, jnp.maximum(by_min_p_B, by_top_p_B))


def _has_top_k(settings: RowSettings, vocab_size: int) -> Array:
    return (settings.top_k_R > 0) & (settings.top_k_R < vocab_size)


def _tempered(logits_BV: Array, settings: RowSettings, is_greedy_B: Array) -> Array:
    return logits_BV / jnp.where(is_greedy_B, 1, settings.temperature_R)[:, None]


def _from(least: _Least, logits_BV: Array, tempered_BV: Array) -> Array:
    """Tempered logits; what does not reach its row's least becomes -inf."""
    is_dropped_BV = (logits_BV < least.logit_B[:, None]) | (tempered_BV < least.tempered_B[:, None])
    return jnp.where(is_dropped_BV, -jnp.inf, tempered_BV)


def _nothing(is_greedy_B: Array) -> Array:
    """[B] a least that keeps all."""
    return jnp.full(is_greedy_B.shape, -jnp.inf)


def _least_of_min_p(logits_BV: Array, min_p_B: Array, has_B: Array) -> Array:
    """Tokens at least min_p times as likely as the likeliest are kept."""
    with jax.named_scope("min_p"):
        # The barrier: of a branch this small XLA makes a selection, which reads the logits in every step.
        top_B = lax.optimization_barrier(row_max(logits_BV))
        return jnp.where(has_B, top_B + jnp.log(min_p_B), -jnp.inf)


def _least_of_top_k(logits_BV: Array, top_k_B: Array, has_B: Array) -> Array:
    """The k likeliest tokens are kept. What min-p drops need not be masked before: where it leaves fewer than k, the
    k-th largest of all lies below its least."""
    with jax.named_scope("top_k"):
        return kth_largest(logits_BV, jnp.where(has_B, top_k_B, 0))


def _least_of_top_p(logits_BV: Array, top_p_B: Array, has_B: Array) -> Array:
    """The likeliest tokens whose probability together reaches p are kept."""
    with jax.named_scope("top_p"):
        probability_BV = probabilities(logits_BV)
        least_B = least_of_mass(probability_BV, jnp.where(has_B, top_p_B, 0))
        return row_min(jnp.where(probability_BV < least_B[:, None], jnp.inf, logits_BV))
