"""What the device knows of each row between steps: sampling settings, last token, output counts.

Written by `admit` when a sequence takes a row and by `advance` after each sampled token. Knows no page, no text and
no scheduler; the host packs admissions with plain numpy (`pack_admission`, `pack_slot`).
Invariant: padding (row R, slot Y) writes nothing; what a row held before its admission leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxserve.core.plan import RowAdmission
from jaxserve.core.sampling_params import BAD_WORD_TOKENS_MAX, BAD_WORDS_MAX, STOP_TOKENS_MAX

NO_STOP = np.iinfo(np.int32).max    # fills unused stop ids: out of every vocabulary, so scatters drop it
NO_WORD = -1                        # fills unused places of bad words
NO_TOKEN = -2                       # history before the first output token; equals no token and no filler


@flax.struct.dataclass
class RowSettings:
    """How each row samples; changes only when a sequence takes the row.

    Attributes:
      temperature_R: 0 is greedy.  top_k_R: 0 is off.  top_p_R: 1 is off.  min_p_R: 0 is off.
      repetition_R: 1 is off.  frequency_R, presence_R: 0 is off.
      seed_high_R, seed_low_R: the request's 64-bit seed.  choice_R: index among the request's choices.
      prompt_length_R: positions from here on are output.  min_tokens_R: no stop id before that many.
      stop_id_RX: ids masked until then, NO_STOP fills.
      slot_R: shaping slot, -1 for none.  has_logprobs_R: the row wants logprobs.
      is_long_R: the sequence is past the length at which its keys turn another way.
    """

    temperature_R: Array
    top_k_R: Array
    top_p_R: Array
    min_p_R: Array
    repetition_R: Array
    frequency_R: Array
    presence_R: Array
    seed_high_R: Array
    seed_low_R: Array
    choice_R: Array
    prompt_length_R: Array
    min_tokens_R: Array
    stop_id_RX: Array
    slot_R: Array
    has_logprobs_R: Array
    is_long_R: Array


@flax.struct.dataclass
class ShapingSlots:
    """The heavy settings of the bounded number of rows that have any.

    Attributes:
      bias_YV: logit bias; -inf where the token is not allowed or is a bad word of one token.
      is_prompt_YV: the token occurs in the prompt.
      bad_word_YWJ: bad words of several tokens, ending in the last place, NO_WORD fills.
    """

    bias_YV: Array
    is_prompt_YV: Array
    bad_word_YWJ: Array


@flax.struct.dataclass
class RowState:
    """All rows.

    Attributes:
      last_token_R: newest token, sampled or admitted; the next step's forward reads it.
      history_RJ: newest output tokens, newest last, NO_TOKEN before the first.
      count_YV: how often each token occurs in the slot's output.
    """

    settings: RowSettings
    slots: ShapingSlots
    last_token_R: Array
    history_RJ: Array
    count_YV: Array


def empty_rows(*, row_count: int, slot_count: int, vocab_size: int) -> RowState:
    """Rows that nobody holds: greedy, nothing asked for."""
    blank = _blank_settings(row_count)
    return RowState(
        settings=RowSettings(**{name: jnp.asarray(value) for name, value in blank.items()}),
        slots=ShapingSlots(
            bias_YV=jnp.zeros((slot_count, vocab_size), jnp.float32),
            is_prompt_YV=jnp.zeros((slot_count, vocab_size), bool),
            bad_word_YWJ=jnp.full((slot_count, BAD_WORDS_MAX, BAD_WORD_TOKENS_MAX), NO_WORD, jnp.int32),
        ),
        last_token_R=jnp.zeros(row_count, jnp.int32),
        history_RJ=jnp.full((row_count, BAD_WORD_TOKENS_MAX), NO_TOKEN, jnp.int32),
        count_YV=jnp.zeros((slot_count, vocab_size), jnp.int32),
    )


def pack_admission(
    admissions: Sequence[RowAdmission], row_count: int, capacity: int, rope_switch: int | None = None
) -> dict[str, NDArray[np.generic]]:
    """Arrays for `admit`, padded to `capacity` rows with row R."""
    if len(admissions) > capacity:
        raise ValueError(f"{len(admissions)} admissions do not fit a capacity of {capacity}")
    packed = _blank_settings(capacity)
    packed["row"] = np.full(capacity, row_count, np.int32)
    packed["last_token_R"] = np.zeros(capacity, np.int32)
    packed["history_RJ"] = np.full((capacity, BAD_WORD_TOKENS_MAX), NO_TOKEN, np.int32)
    for place, admission in enumerate(admissions):
        params = admission.params
        seed = admission.seed & (2**64 - 1)     # two's complement: seeds are int64
        output = admission.token_ids[admission.prompt_length :][-BAD_WORD_TOKENS_MAX:]
        values: dict[str, object] = {
            "row": admission.row,
            "temperature_R": 0.0 if params.is_greedy else params.temperature,
            "top_k_R": params.top_k,
            "top_p_R": params.top_p,
            "min_p_R": params.min_p,
            "repetition_R": params.repetition_penalty,
            "frequency_R": params.frequency_penalty,
            "presence_R": params.presence_penalty,
            "seed_high_R": seed >> 32,
            "seed_low_R": seed & 0xFFFFFFFF,
            "choice_R": admission.choice,
            "prompt_length_R": admission.prompt_length,
            "min_tokens_R": params.min_tokens,
            "slot_R": admission.slot,
            "has_logprobs_R": params.logprobs is not None,
            "is_long_R": rope_switch is not None and len(admission.token_ids) > rope_switch,
            "last_token_R": admission.token_ids[-1],
        }
        for name, value in values.items():
            packed[name][place] = value
        if len(admission.stop_token_ids) > STOP_TOKENS_MAX:
            raise ValueError(f"a row carries at most {STOP_TOKENS_MAX} stop ids, got {len(admission.stop_token_ids)}")
        packed["stop_id_RX"][place, : len(admission.stop_token_ids)] = admission.stop_token_ids
        if len(output):
            packed["history_RJ"][place, -len(output) :] = output
    return packed


def admit(rows: RowState, packed: dict[str, Array]) -> RowState:
    """Sequences take rows; `packed` is `pack_admission`' on the device."""
    row = packed["row"]

    def put(name: str, old: Array) -> Array:
        return old.at[row].set(packed[name], mode="drop")

    settings = {name: put(name, getattr(rows.settings, name)) for name in RowSettings.__dataclass_fields__}
    return rows.replace(
        settings=RowSettings(**settings),
        last_token_R=put("last_token_R", rows.last_token_R),
        history_RJ=put("history_RJ", rows.history_RJ),
    )


def pack_slot(admission: RowAdmission, *, vocab_size: int) -> dict[str, NDArray[np.generic]]:
    """Arrays for `admit_slot`, of one admission that has a shaping slot."""
    params = admission.params
    bias_V = np.zeros(vocab_size, np.float32)
    for token, bias in params.logit_bias:
        bias_V[token] += bias
    if params.allowed_token_ids is not None:
        is_allowed_V = np.zeros(vocab_size, bool)
        is_allowed_V[list(params.allowed_token_ids)] = True
        bias_V[~is_allowed_V] = -np.inf
    bad_word_WJ = np.full((BAD_WORDS_MAX, BAD_WORD_TOKENS_MAX), NO_WORD, np.int32)
    longer = [word for word in params.bad_words_token_ids if len(word) > 1]
    bias_V[[word[0] for word in params.bad_words_token_ids if len(word) == 1]] = -np.inf
    for place, word in enumerate(longer):
        bad_word_WJ[place, -len(word) :] = word
    prompt, output = np.split(admission.token_ids, [admission.prompt_length])
    is_prompt_V = np.zeros(vocab_size, bool)
    is_prompt_V[prompt] = True
    count_V = np.bincount(output, minlength=vocab_size).astype(np.int32)
    return {
        "slot": np.int32(admission.slot),
        "bias_V": bias_V,
        "is_prompt_V": is_prompt_V,
        "bad_word_WJ": bad_word_WJ,
        "count_V": count_V,
    }


def admit_slot(rows: RowState, packed: dict[str, Array]) -> RowState:
    """One sequence takes a shaping slot; `packed` is `pack_slot`'s on the device."""
    slot = packed["slot"]
    return rows.replace(
        slots=ShapingSlots(
            bias_YV=rows.slots.bias_YV.at[slot].set(packed["bias_V"], mode="drop"),
            is_prompt_YV=rows.slots.is_prompt_YV.at[slot].set(packed["is_prompt_V"], mode="drop"),
            bad_word_YWJ=rows.slots.bad_word_YWJ.at[slot].set(packed["bad_word_WJ"], mode="drop"),
        ),
        count_YV=rows.count_YV.at[slot].set(packed["count_V"], mode="drop"),
    )


def advance(rows: RowState, row_B: Array, token_B: Array) -> RowState:
    """Each row has sampled its token; padding rows (R) are dropped."""
    with jax.named_scope("rows.advance"):
        history_BJ = rows.history_RJ.at[row_B].get(mode="clip")
        history_BJ = jnp.concatenate([history_BJ[:, 1:], token_B[:, None]], axis=1)
        slot_count = rows.count_YV.shape[0]
        slot_B = rows.settings.slot_R.at[row_B].get(mode="fill", fill_value=-1)
        slot_B = jnp.where(slot_B < 0, slot_count, slot_B)    # a negative index would count from the end
        return rows.replace(
            last_token_R=rows.last_token_R.at[row_B].set(token_B, mode="drop"),
            history_RJ=rows.history_RJ.at[row_B].set(history_BJ, mode="drop"),
            count_YV=rows.count_YV.at[slot_B, token_B].add(1, mode="drop"),
        )


def _blank_settings(count: int) -> dict[str, NDArray[np.generic]]:
    """Settings of `count` rows that ask for nothing."""
    filled: dict[str, tuple[object, type]] = {
        "temperature_R": (0, np.float32),
        "top_k_R": (0, np.int32),
        "top_p_R": (1, np.float32),
        "min_p_R": (0, np.float32),
        "repetition_R": (1, np.float32),
        "frequency_R": (0, np.float32),
        "presence_R": (0, np.float32),
        "seed_high_R": (0, np.uint32),
        "seed_low_R": (0, np.uint32),
        "choice_R": (0, np.int32),
        "prompt_length_R": (0, np.int32),
        "min_tokens_R": (0, np.int32),
        "slot_R": (-1, np.int32),
        "has_logprobs_R": (False, np.bool_),
        "is_long_R": (False, np.bool_),
    }
    blank: dict[str, NDArray[np.generic]] = {
        name: np.full(count, value, dtype) for name, (value, dtype) in filled.items()
    }
    blank["stop_id_RX"] = np.full((count, STOP_TOKENS_MAX), NO_STOP, np.int32)
    return blank
