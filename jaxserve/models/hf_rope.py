"""Reads rotary embeddings from a config.json, in the spellings of transformers 4 (`rope_theta` and `rope_scaling`) and
5 (`rope_parameters`, one or one a layer type). Every field is used or an error.

Dynamic NTK scaling changes nothing up to `max_position_embeddings` and turns cached keys wrong beyond, so it is read
as no scaling: the context length is the limit of what is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.core.rope import Linear, Llama3, LongRope, Rope, Scaling, Unscaled, Yarn

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class RopeFields:
    """One rope's fields on their way to a Rope. Mutable: what was used is gone."""

    def __init__(self, fields: Mapping[str, Any], *, where: str, length_max: int, original_length: int | None) -> None:
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._where = where
        self._length_max = length_max
        self._original_length = original_length

    def read(self, head_dim: int, *, theta: float, part: float | None, pairs: Literal["halves", "neighbours"]) -> Rope:
        """The rope; theta and part (of a head that turns) are what the config says elsewhere."""
        theta = self._number("rope_theta", theta)
        if part is None and self._fields.get("partial_rotary_factor", 1) == 1:
            self._fields.pop("partial_rotary_factor", None)
        part = 1.0 if part is None else self._number("partial_rotary_factor", part)
        dim = int(head_dim * part)
        if not 0 < dim <= head_dim or dim % 2:
            raise UnsupportedModelError(
                f"config.json: a partial_rotary_factor of {part} turns {dim} of {head_dim} elements; it must be an "
                "even number of at most all"
            )
        names = {self._fields.pop(key) for key in ("rope_type", "type") if key in self._fields} or {"default"}
        kind = names.pop() if len(names) == 1 else None
        scaling = self._scaling({"su": "longrope"}.get(str(kind), kind), dim)
        for name, value in self._fields.items():
            where = f"{self._where}.{name}"
            raise UnsupportedModelError(f"config.json: {where} = {value!r} is not implemented for {kind!r}")
        return Rope(theta=theta, dim=dim, scaling=scaling, pairs=pairs)

    def _scaling(self, kind: str | None, dim: int) -> Scaling:
        match kind:
            case "default":
                return Unscaled()
            case "linear":
                return Linear(factor=self._number("factor"))
            case "dynamic":
                self._number("factor")
                self._fields.pop("original_max_position_embeddings", None)
                return Unscaled()
            case "llama3":
                return Llama3(
                    factor=self._number("factor"), low_freq_factor=self._number("low_freq_factor"),
                    high_freq_factor=self._number("high_freq_factor"), original_context_length=self._original(),
                )
            case "yarn":
                return self._yarn()
            case "longrope":
                return self._longrope(dim)
            case _:
                raise UnsupportedModelError(
                    f"config.json: {self._where} has rope type {kind!r}, which is not implemented; implemented are "
                    + ", ".join(KINDS)
                )

    def _yarn(self) -> Yarn:
        original = self._original()
        factor = self._number("factor", self._length_max / original)
        mscale, mscale_all = self._number("mscale", 0.0), self._number("mscale_all_dim", 0.0)
        size = mscale_of(factor)
        if mscale and mscale_all:
            size = mscale_of(factor, mscale) / mscale_of(factor, mscale_all)
        return Yarn(
            factor=factor, original_context_length=original,
            beta_fast=self._number("beta_fast", 32.0), beta_slow=self._number("beta_slow", 1.0),
            is_truncated=bool(self._fields.pop("truncate", True)),
            attention_factor=self._number("attention_factor", size),
        )

    def _longrope(self, dim: int) -> LongRope:
        original = self._original()
        factor = self._number("factor", self._length_max / original)
        size = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return LongRope(
            short_factors=self._numbers("short_factor", dim // 2), long_factors=self._numbers("long_factor", dim // 2),
            original_context_length=original, attention_factor=self._number("attention_factor", size),
        )

    def _original(self) -> int:
        """The context length the model was first trained for; Phi-3 says it at the top level."""
        return int(self._number("original_max_position_embeddings", self._original_length))

    def _number(self, name: str, default: float | None = None) -> float:
        value = self._fields.pop(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or (value <= 0 and value != default):
            raise ModelError(f"config.json: {self._where}.{name} is {value!r}; it must be a number above 0")
        return float(value)

    def _numbers(self, name: str, count: int) -> tuple[float, ...]:
        values = self._fields.pop(name, None)
        if not isinstance(values, list) or len(values) != count or not all(
            isinstance(value, (int, float)) and value > 0 for value in values
        ):
            raise ModelError(f"config.json: {self._where}.{name} must be {count} numbers above 0, one a pair")
        return tuple(float(value) for value in values)


def mscale_of(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of attention logits with the stretching factor."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
