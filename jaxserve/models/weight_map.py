"""Where each parameter comes from in a checkpoint, as data that families write and `jaxserve.weights` obeys.

Knows names and row counts; no file and no array.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Rows of a fused parameter that one checkpoint tensor fills; `rows` None is the whole parameter."""

    name: str
    rows: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """Attributes:
    sources: parameter path ("layers_0/attention/qkv/weight") -> its sections, stacked along the first axis. It may
      list parameters that the model does not have (biases): the model's own tree decides.
    ignorable: patterns of tensor names that are not parameters, matched against the whole name.

    Tensor names are without a leading "model.", which some checkpoints have and some have not.
    """

    sources: dict[str, tuple[Section, ...]]
    ignorable: tuple[str, ...] = ()
