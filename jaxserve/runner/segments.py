"""How a model's layers are cut into segments: programs of a few layers that are compiled once and called in turn.

A program of all layers repeats the same code for each; XLA compiles every copy, and keeps it (140 MB for SmolLM2's 30
layers on the CPU, times the buckets). A call costs some 80 µs of host time. So: the fewest distinct layers to compile
that need at most CALLS_MAX calls.
Invariant: the segments cover the layers once, in order; segments of one kind are equal but for parameters and pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from jaxserve.core.model_spec import ModelSpec
from jaxserve.layers.context import LayerKv
from jaxserve.runner.forward import Begun, ForwardResult

CALLS_MAX = 10


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers `start` to `stop`; `kind` numbers the distinct programs."""

    start: int
    stop: int
    kind: int

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)


def cut(spec: ModelSpec, params: Any = None) -> tuple[Segment, ...]:
    """The segments of a model.

    Thirty equal layers are ten calls of one program of three; with a pattern of six, programs are multiples of it.

    Args:
      params: abstract values, where layers may be packed each in its own way.
    """
    groups = {layer: number for number, group in enumerate(spec.kv_groups) for layer in group.layers}
    kinds = [
        (layer, groups[index], None if params is None else _shapes(params[f"layers_{index}"]))
        for index, layer in enumerate(spec.layers)
    ]
    count = len(kinds)

    def segments(size: int) -> list[Segment]:
        seen: dict[tuple[Any, ...], int] = {}
        starts = range(0, count, size)
        return [
            Segment(start, min(start + size, count), seen.setdefault(tuple(kinds[start : start + size]), len(seen)))
            for start in starts
        ]

    def compiled_layers(found: list[Segment]) -> int:
        return sum({segment.kind: len(segment.layers) for segment in found}.values())

    sizes = range(-(-count // CALLS_MAX), count + 1)
    return tuple(min(map(segments, sizes), key=lambda found: (compiled_layers(found), len(found))))


def _shapes(params: Any) -> tuple[Any, ...]:
    """What a program of a layer is compiled for."""
    leaves, tree = jax.tree.flatten(params)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@dataclass(frozen=True, slots=True)
class Leaves:
    """The parameters of each call, flat: walking a nested tree at every call costs more than its dispatch."""

    begin: tuple[Any, ...] = ()
    segments: tuple[tuple[tuple[Any, ...], ...], ...] = ()
    finish: tuple[Any, ...] = ()


def leaves_of(params: Any, segments: tuple[Segment, ...]) -> Leaves:
    """`params` may be arrays or their abstract values."""
    begin, finish = ends(params)
    return Leaves(
        begin=tuple(jax.tree.leaves(begin)),
        segments=tuple(
            tuple(tuple(jax.tree.leaves(params[f"layers_{index}"])) for index in segment.layers)
            for segment in segments
        ),
        finish=tuple(jax.tree.leaves(finish)),
    )


def ends(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters that are used before the first layer and after the last."""
    begin = {name: params[name] for name in ("embedding", "positions") if name in params}
    return begin, {"final_norm": params["final_norm"]}


@dataclass(frozen=True, slots=True)
class StepForward:
    """The compiled programs of one token bucket, called like `forward.forward`."""

    begin: Callable[..., Begun]
    run_layers: tuple[Callable[..., tuple[Array, tuple[LayerKv, ...]]], ...]    # by kind
    finish: Callable[..., Any]
    segments: tuple[Segment, ...]

    def __call__(
        self, leaves: Leaves, kv: tuple[LayerKv, ...], page_RM: tuple[Array, ...], last_token_R: Array,
        is_long_R: Array, packed_W: Any,
    ) -> ForwardResult:
        begun = self.begin(leaves.begin, page_RM, last_token_R, is_long_R, packed_W)
        x_TD, new_kv = begun.x_TD, []
        for segment, of_segment in zip(self.segments, leaves.segments, strict=True):
            x_TD, of_layers = self.run_layers[segment.kind](
                of_segment, x_TD, begun.turns, begun.context, kv[segment.start : segment.stop]
            )
            new_kv += of_layers
        hidden_TD, sampling = self.finish(leaves.finish, x_TD, begun.token_B, begun.row_B, begun.position_B)
        return ForwardResult(hidden_TD, sampling, tuple(new_kv), begun.context.page_RM)
