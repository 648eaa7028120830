"""Matches a model's parameters with a checkpoint's tensors: every parameter exactly once, nothing left over.

Knows names, shapes and dtypes; reads no data. Invariant: what `match` returns covers the abstract tree completely, or
it raises one WeightsError that names what is missing, extra and mis-shaped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.models.weight_map import Section, Stacked, View, WeightMap
from jaxserve.quantization.packing import path_of
from jaxserve.weights.files import StoredTensor

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
NAMED_MAX = 8       # names listed of each kind of problem
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")    # of the text part of a larger model


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A box of a parameter, `at` and `shape`, that (a view of) one tensor fills."""

    tensor: StoredTensor
    at: tuple[int, ...]
    shape: tuple[int, ...]
    view: View | None

    def read(self) -> Any:
        """The stored values, in the box's shape."""
        data = self.tensor.data if self.view is None else self.view(self.tensor.data)
        return data.reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """One parameter: blocks that fill it without gap or overlap."""

    path: str
    abstract: jax.ShapeDtypeStruct
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a section goes."""

    section: Section
    at: tuple[int, ...]
    shape: tuple[int, ...]


def match(abstract: Any, weight_map: WeightMap, stored: Mapping[str, StoredTensor]) -> list[Assembly]:
    """The blocks of every parameter, in the tree's order."""
    there = _without_prefix(stored, weight_map.prefixes)
    left = dict(there)
    missing: dict[str, None] = {}
    wrong: dict[str, None] = {}
    assemblies: list[Assembly] = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = path_of(key_path)
        blocks: list[Block] = []
        for place in _places(weight_map.sources[path], leaf.shape, path):
            name = place.section.name
            left.pop(name, None)
            tensor = there.get(name)
            if tensor is None:
                missing[name + _hint(name, there)] = None
            elif (problem := _problem(tensor, place)) is not None:
                wrong[problem] = None
            else:
                blocks.append(Block(tensor=tensor, at=place.at, shape=place.shape, view=place.section.view))
        assemblies.append(Assembly(path=path, abstract=leaf, blocks=tuple(blocks)))
    extra = [
        tensor.name for name, tensor in left.items()
        if not any(re.fullmatch(pattern, name) for pattern in weight_map.ignorable)
    ]
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:NAMED_MAX])}{', …' if len(found) > NAMED_MAX else ''}"
        for kind, found in (
            ("missing", list(missing)), ("mis-shaped", list(wrong)), ("not part of the model", extra)
        ) if found
    ]
    if problems:
        raise WeightsError("the checkpoint does not fit its config.json; tensors " + "; tensors ".join(problems))
    return assemblies


def _places(source: tuple[Section, ...] | Stacked, shape: tuple[int, ...], path: str) -> Iterator[_Place]:
    """Boxes of a parameter, in order; they must fill it."""
    parts = source.parts if isinstance(source, Stacked) else (source,)
    inner = shape[1:] if isinstance(source, Stacked) else shape
    assert not isinstance(source, Stacked) or len(parts) == shape[0], path
    for index, sections in enumerate(parts):
        begin = 0
        for section in sections:
            rows = inner[0] if section.rows is None else section.rows
            box, at = (rows, *inner[1:]), (begin, *(0 for _ in inner[1:]))
            if isinstance(source, Stacked):
                box, at = (1, *box), (index, *at)
            yield _Place(section=section, at=at, shape=box)
            begin += rows
        assert begin == inner[0], path


def _problem(tensor: StoredTensor, place: _Place) -> str | None:
    """Why a tensor cannot fill its place."""
    if tensor.data.dtype.name not in FLOATS:
        return f"{tensor.name} is {tensor.data.dtype.name}: quantised weights of this kind are not read"
    view = place.section.view
    wanted = place.shape[len(place.shape) - len(tensor.shape) :] if view is None else place.shape
    try:
        # A stand-in of the same shape that takes no memory: views look at shapes only.
        seen = (np.broadcast_to(np.int8(0), tensor.shape) if view is None else view(
            np.broadcast_to(np.int8(0), tensor.shape)
        )).shape
    except (IndexError, ValueError) as error:
        return f"{tensor.name} is {list(tensor.shape)}, which cannot be looked at as its parameter wants: {error}"
    if seen in (wanted, place.shape) or (1, *seen) == place.shape:
        return None
    expected = f"expected {list(wanted)}" if view is None else f"it gives {list(seen)}, expected {list(wanted)}"
    return f"{tensor.name} is {list(tensor.shape)}, {expected}"


def _without_prefix(stored: Mapping[str, StoredTensor], prefixes: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Names without the prefix that says which part of a model, or which wrapper, they belong to."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        prefix = max((p for p in (*prefixes, *PREFIXES) if name.startswith(p)), key=len, default="")
        short = name[len(prefix) :]
        if short in found:
            raise WeightsError(f"the checkpoint has both {found[short].name!r} and {name!r}, which name one tensor")
        found[short] = tensor
    return found


def _hint(name: str, there: Mapping[str, StoredTensor]) -> str:
    if name == "lm_head.weight":
        return " (if the head shares the embedding's weights, config.json must say tie_word_embeddings: true)"
    near = difflib.get_close_matches(name, there, 1, cutoff=0.9) if len(there) < 5000 else []
    return f" (the nearest is {near[0]})" if near and near[0] != name else ""
