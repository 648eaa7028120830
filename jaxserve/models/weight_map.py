"""Where each parameter comes from in a checkpoint, as data that families write and `jaxserve.weights` obeys.

Knows names, row counts and how a stored tensor must be looked at; no file, and no array but as a view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

View = Callable[[Any], Any]     # numpy array -> view of it; also called with a stand-in that has only a shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What one checkpoint tensor fills of a parameter: `rows` along the axis of concatenation, None being all.

    `view` looks at the stored tensor as the parameter wants it: transposed, some rows of it, one expert. It must only
    slice, transpose and reshape. One tensor may serve several sections.
    """

    name: str
    rows: int | None = None
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Stacked:
    """Parts along a new first axis, each of sections laid one after the other: an expert each, or a head each."""

    parts: tuple[tuple[Section, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """Attributes:
    sources: parameter path ("layers_0/attention/qkv/weight") -> its sections, stacked along the first axis. It may
      list parameters that the model does not have (biases): the model's own tree decides.
    ignorable: patterns of tensor names that are not parameters, matched against the whole name.
    prefixes: what names may begin with; the longest that fits is taken off.
    """

    sources: dict[str, tuple[Section, ...] | Stacked]
    ignorable: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("model.",)
