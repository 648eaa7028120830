"""The mapping behind `--speculative-config`, in vLLM's keys, to its configuration; or a ConfigError naming the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.core.config import SpeculativeConfig
from jaxserve.core.errors import ConfigError

TOKENS_MAX = 32     # of a draft: beyond it hardly any is accepted, and each costs a sampling row
LOOKUP_MAX = 64
NGRAM = 5           # where neither bound of the n-gram is given, as in vLLM

_BOUNDS = {"num_speculative_tokens": TOKENS_MAX, "prompt_lookup_max": LOOKUP_MAX, "prompt_lookup_min": LOOKUP_MAX}


def speculative_config(raw: Mapping[str, Any]) -> SpeculativeConfig:
    """Checks every key; one bound of the n-gram stands for both where the other is missing."""
    method = raw.get("method")
    if method is None:
        raise ConfigError('speculative-config needs a method: {"method": "ngram", "num_speculative_tokens": 4}')
    if method == "draft_model":
        return _draft_model(raw)
    if method != "ngram":
        raise ConfigError(f"speculative-config: method {method!r} is not built yet; use ngram or draft_model")
    for key in raw.keys() - {"method", *_BOUNDS}:
        raise ConfigError(f"speculative-config has no key {key!r} for ngram; the keys are method, {', '.join(_BOUNDS)}")
    values = {key: _whole(key, raw[key]) for key in _BOUNDS if raw.get(key) is not None}
    _check_count(values)
    longest = values.get("prompt_lookup_max", values.get("prompt_lookup_min", NGRAM))
    shortest = values.get("prompt_lookup_min", longest)
    if shortest > longest:
        raise ConfigError(
            f"speculative-config: prompt_lookup_min {shortest} is above prompt_lookup_max {longest}; lower the first"
        )
    return SpeculativeConfig(
        num_speculative_tokens=values["num_speculative_tokens"], prompt_lookup_max=longest, prompt_lookup_min=shortest
    )


def _draft_model(raw: Mapping[str, Any]) -> SpeculativeConfig:
    keys = ("method", "model", "num_speculative_tokens")
    for key in raw.keys() - set(keys):
        raise ConfigError(f"speculative-config has no key {key!r} for draft_model; the keys are {', '.join(keys)}")
    model = raw.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError(f"speculative-config: draft_model needs a model, a folder or a hub name, got {model!r}")
    values = {key: _whole(key, raw[key]) for key in ("num_speculative_tokens",) if raw.get(key) is not None}
    _check_count(values)
    return SpeculativeConfig(method="draft_model", model=model, **values)


def _check_count(values: Mapping[str, int]) -> None:
    if "num_speculative_tokens" not in values:
        raise ConfigError(f"speculative-config needs num_speculative_tokens, in [1, {TOKENS_MAX}]")


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _BOUNDS[key]:
        raise ConfigError(f"speculative-config: {key} must be a whole number in [1, {_BOUNDS[key]}], got {value!r}")
    return value
