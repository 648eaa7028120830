"""Matches a model's parameters with a checkpoint's tensors: every parameter exactly once, nothing left over.

Knows names, shapes and dtypes; reads no data. Invariant: what `match` returns covers the abstract tree completely, or
it raises one WeightsError that names what is missing, extra and mis-shaped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.core.errors import WeightsError
from jaxserve.models.weight_map import WeightMap
from jaxserve.weights.safetensors import StoredTensor

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
NAMED_MAX = 8       # names listed of each kind of problem
PREFIX = "model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """One parameter: checkpoint tensors stacked along the first axis."""

    path: str
    abstract: jax.ShapeDtypeStruct
    parts: tuple[StoredTensor, ...]


def parameter_path(path: tuple[Any, ...]) -> str:
    """A jax key path as the weight maps write it: "layers_0/mlp/down/weight"."""
    return "/".join(str(key.key) for key in path)


def match(abstract: Any, weight_map: WeightMap, stored: Mapping[str, StoredTensor]) -> list[Assembly]:
    """The tensors of every parameter, in the tree's order."""
    left = _without_prefix(stored)
    names = list(left)
    missing: list[str] = []
    wrong: list[str] = []
    assemblies: list[Assembly] = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = parameter_path(key_path)
        parts: list[StoredTensor] = []
        for section in weight_map.sources[path]:
            shape = leaf.shape if section.rows is None else (section.rows, *leaf.shape[1:])
            tensor = left.pop(section.name, None)
            if tensor is None:
                missing.append(section.name + _hint(section.name, names))
            elif tensor.shape != shape:
                wrong.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)}")
            elif tensor.data.dtype.name not in FLOATS:
                wrong.append(f"{tensor.name} is {tensor.data.dtype.name}: quantised weights are not read yet")
            else:
                parts.append(tensor)
        assert sum(section.rows or leaf.shape[0] for section in weight_map.sources[path]) == leaf.shape[0], path
        assemblies.append(Assembly(path=path, abstract=leaf, parts=tuple(parts)))
    extra = [
        tensor.name for name, tensor in left.items()
        if not any(re.fullmatch(pattern, name) for pattern in weight_map.ignorable)
    ]
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:NAMED_MAX])}{', …' if len(found) > NAMED_MAX else ''}"
        for kind, found in (("missing", missing), ("mis-shaped", wrong), ("not part of the model", extra)) if found
    ]
    if problems:
        raise WeightsError("the checkpoint does not fit its config.json; tensors " + "; tensors ".join(problems))
    return assemblies


def _without_prefix(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names without "model.", which the bare model's checkpoints lack."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        short = name.removeprefix(PREFIX)
        if short in found:
            raise WeightsError(f"the checkpoint has both {found[short].name!r} and {name!r}, which name one tensor")
        found[short] = tensor
    return found


def _hint(name: str, names: list[str]) -> str:
    if name == "lm_head.weight":
        return " (if the head shares the embedding's weights, config.json must say tie_word_embeddings: true)"
    near = difflib.get_close_matches(name, names, 1, cutoff=0.9) if len(names) < 5000 else []
    return f" (the nearest is {near[0]})" if near and near[0] != name else ""
