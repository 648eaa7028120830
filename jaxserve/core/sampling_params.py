"""What a client may ask of sampling: names, defaults and bounds are vLLM's. Knows no tokenizer and no device.

Invariant: an instance that exists is valid; every bound is checked once, here, and the error names the field,
the value and the bound. Checks that need the vocabulary or the context length are in `check_against`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from jaxserve.core.errors import RequestError

GREEDY_BELOW = 1e-5          # a temperature under this is greedy
TEMPERATURE_MIN = 0.01       # a smaller positive temperature is raised to this (overflow of logits / t)
CHOICES_MAX = 128
STOP_STRINGS_MAX = 16
STOP_TOKENS_MAX = 64         # ids a row carries for `min_tokens`, the model's own eos ids included
BIAS_ENTRIES_MAX = 1024
BAD_WORDS_MAX = 32           # words of several tokens a row; words of one token are free
BAD_WORD_TOKENS_MAX = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample one request.

    Attributes:
      n: choices to return.
      presence_penalty, frequency_penalty: over the output, in [-2, 2].
      repetition_penalty: over prompt and output, > 0; 1.0 is off.
      temperature: in [0, 2]; below 1e-5 is greedy and resets top_p, top_k and min_p.
      top_p: in (0, 1].  top_k: 0 or -1 is off.  min_p: in [0, 1].
      seed: int64 or None (drawn by the server); -1 is None.
      stop: strings that end the output.  stop_token_ids: ids that end it.
      bad_words: strings that must not be produced; `bad_words_token_ids` is their encoded form, set by the text layer.
      max_tokens: None is "as many as fit".  min_tokens: no eos or stop id before that many.
      logprobs: None, or how many alternatives a token besides the sampled one; -1 is the whole vocabulary.
      prompt_logprobs: likewise for the prompt.
      logit_bias: ((token id, bias), ...).  allowed_token_ids: only these may be sampled.
      detokenize: False leaves `text` empty and needs no tokenizer.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # normal forms of a value under construction, before anyone sees it
        if isinstance(self.stop, str):
            set_(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words"):
            set_(self, name, tuple(getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            set_(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if isinstance(self.logit_bias, dict):
            set_(self, "logit_bias", tuple(self.logit_bias.items()))
        set_(self, "logit_bias", tuple((int(k), float(v)) for k, v in (self.logit_bias or ())))
        if self.seed == -1:
            set_(self, "seed", None)
        if self.top_k == -1:
            set_(self, "top_k", 0)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                set_(self, name, 1 if value else None)
        self._check()
        if 0 < self.temperature < TEMPERATURE_MIN and not self.is_greedy:
            set_(self, "temperature", TEMPERATURE_MIN)
        if self.is_greedy:
            if self.n != 1:
                raise RequestError(f"n must be 1 when using greedy sampling, got {self.n}.", param="n", value=self.n)
            for name, off in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                set_(self, name, off)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def needs_shaping(self) -> bool:
        """Whether a row with these parameters takes one of the bounded shaping slots of the device."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or bool(self.logit_bias)
            or bool(self.bad_words_token_ids)
            or self.allowed_token_ids is not None
        )

    def with_(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def _check(self) -> None:
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        self._whole("n", 1, CHOICES_MAX)
        self._in_range("presence_penalty", -2, 2)
        self._in_range("frequency_penalty", -2, 2)
        self._in_range("temperature", 0, 2)
        self._in_range("top_p", 0, 1, open_low=True)
        self._in_range("min_p", 0, 1)
        penalty = self.repetition_penalty
        is_number = isinstance(penalty, (int, float)) and not isinstance(penalty, bool)
        if not is_number or not math.isfinite(penalty) or penalty <= 0:
            raise RequestError(
                f"repetition_penalty must be a finite number greater than zero, got {penalty}.",
                param="repetition_penalty", value=penalty,
            )
        self._whole("top_k", 0, 2**31 - 1)
        self._whole("seed", -(2**63), 2**63 - 1, optional=True)
        self._whole("max_tokens", 1, 2**31 - 1, optional=True)
        self._whole("min_tokens", 0, 2**31 - 1)
        self._whole("logprobs", -1, 2**31 - 1, optional=True)
        self._whole("prompt_logprobs", -1, 2**31 - 1, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}.",
                param="min_tokens", value=self.min_tokens,
            )

    def _check_lists(self) -> None:
        if len(self.stop) > STOP_STRINGS_MAX:
            raise RequestError(f"stop may hold at most {STOP_STRINGS_MAX} strings, got {len(self.stop)}.", param="stop")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop cannot contain an empty string.", param="stop")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True.", param="stop")
        if any(not isinstance(s, str) or not s.strip() for s in self.bad_words):
            raise RequestError("bad_words cannot contain an empty string.", param="bad_words")
        if len(self.stop_token_ids) > STOP_TOKENS_MAX:
            raise RequestError(
                f"stop_token_ids may hold at most {STOP_TOKENS_MAX} ids, got {len(self.stop_token_ids)}.",
                param="stop_token_ids",
            )
        if len(self.logit_bias) > BIAS_ENTRIES_MAX:
            raise RequestError(
                f"logit_bias may hold at most {BIAS_ENTRIES_MAX} entries, got {len(self.logit_bias)}.",
                param="logit_bias",
            )
        if any(not math.isfinite(bias) for _, bias in self.logit_bias):
            raise RequestError("logit_bias values must be finite numbers.", param="logit_bias")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is not None and empty!", param="allowed_token_ids")
        longer = [ids for ids in self.bad_words_token_ids if len(ids) > 1]
        if len(longer) > BAD_WORDS_MAX or any(len(ids) > BAD_WORD_TOKENS_MAX for ids in longer):
            raise RequestError(
                f"bad_words may hold at most {BAD_WORDS_MAX} words of several tokens, each of at most "
                f"{BAD_WORD_TOKENS_MAX} tokens.",
                param="bad_words",
            )

    def _in_range(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number, got {value!r}.", param=name, value=value)
        if value < low or value > high or (open_low and value == low):
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}]"
            raise RequestError(f"{name} must be in {bounds}, got {value}.", param=name, value=value)

    def _whole(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise RequestError(f"{name} must be an integer, got {value!r}.", param=name, value=value)
        if not low <= value <= high:
            raise RequestError(f"{name} must be in [{low}, {high}], got {value}.", param=name, value=value)


def check_against(params: SamplingParams, *, vocab_size: int, logprobs_max: int) -> None:
    """Raises RequestError where `params` and the served model do not go together.

    Args:
      vocab_size: width of the logits; every token id must be below it.
      logprobs_max: the server's `--max-logprobs`; -1 allows the whole vocabulary.
    """
    named = [("stop_token_ids", params.stop_token_ids), ("allowed_token_ids", params.allowed_token_ids or ())]
    named += [("logit_bias", tuple(token for token, _ in params.logit_bias))]
    for name, ids in named:
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise RequestError(
                    f"token id {token} in {name} is out of vocabulary: ids are in [0, {vocab_size - 1}].",
                    param=name, value=token,
                )
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is None:
            continue
        wanted = vocab_size if asked == -1 else asked
        bound = vocab_size if logprobs_max == -1 else logprobs_max
        if wanted > bound:
            raise RequestError(
                f"Requested {name} of {wanted}, which is greater than max allowed: {bound}.", param=name, value=asked
            )
