"""Which matrices of a model are packed, and how: what turns the plain parameter tree into the one that is kept.

Invariant: the packed tree has the paths of the plain one; a packed matrix is one node with the matrix's own path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxserve.quantization import int8, joined, packed
from jaxserve.quantization.codes import Form
from jaxserve.quantization.int8 import Int8Tensor
from jaxserve.quantization.packed import PackedTensor
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding.split import Runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """One matrix: its form, and which of its inputs the devices have."""

    form: Form
    columns: Runs
    device_count: int = 1       # into how many shares the inputs are cut

    def abstract(self, leaf: jax.ShapeDtypeStruct) -> QTensor:
        """The packed matrix as shapes and placements, of the plain one over all devices."""
        if self.form.code == "w8a8":
            return int8.abstract(leaf, is_static=self.form.activations == "static")
        return packed.abstract(self.form, leaf, self.columns, self.device_count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """One matrix whose parts have forms of their own."""

    parts: tuple[joined.Part, ...]
    columns: Runs
    device_count: int = 1

    def abstract(self, leaf: jax.ShapeDtypeStruct) -> QTensor:
        """See `Packed.abstract`."""
        return joined.abstract(self.parts, leaf, self.columns, self.device_count)


Packing = Mapping[str, Packed | Joined]      # parameter path -> how it is packed; others are plain


def path_of(path: tuple[Any, ...]) -> str:
    """A jax key path as weight maps write it: "layers_0/mlp/down/weight"."""
    return "/".join(str(key.key) for key in path)


def applied(abstract: Any, packing: Packing | None) -> Any:
    """The parameter tree as it is kept, from the plain one; both abstract."""
    if not packing:
        return abstract
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: packing[name].abstract(leaf) if (name := path_of(path)) in packing else leaf, abstract
    )


def multiplied_by(params: Any, implementation: str | None) -> Any:
    """The tree whose packed matrices ask for this implementation (`--quantization-backend`); None: any that serves.

    It is a part of the tree's structure, so that what was traced for one is never used for another.
    """
    def asks(node: Any) -> bool:
        return isinstance(node, PackedTensor | Int8Tensor)

    return jax.tree.map(
        lambda node: replace(node, implementation=implementation) if asks(node) else node, params, is_leaf=asks
    )


def is_packed(node: Any) -> bool:
    return isinstance(node, QTensor)
