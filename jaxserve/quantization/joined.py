"""A matrix whose rows are packed in several ways: q and k in four bits, v in six, as GGUF files have them.

    x · [A; B]ᵀ = [x · Aᵀ, x · Bᵀ]

Each device has rows of every part, one part under the other. Knows how the parts lie, not what their codes mean.
Invariant: the parts of a device, joined, are its rows of the whole matrix, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.quantization import packed
from jaxserve.quantization.codes import Form, Host, Packable
from jaxserve.quantization.packed import Cut, PackedTensor
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding.split import Run, Runs


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedTensor(QTensor):
    """Attributes:
    parts: matrices of the same inputs.
    """

    parts: tuple[PackedTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def matmul(self, x_TI: Array, axis: str | None = None) -> Array:
        return jnp.concatenate([part.matmul(x_TI, axis) for part in self.parts], axis=-1)

    def take(self, id_T: Array) -> Array:
        raise NotImplementedError("embeddings are not packed")

    def plain(self) -> Array:
        """The matrix of one device, float32 [O, I]; for tests."""
        return jnp.concatenate([part.plain() for part in self.parts])


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of a matrix that are packed alike.

    Attributes:
      rows: which of the part's own rows the devices have, one device after the other.
    """

    form: Form
    rows: Runs


def split(forms: Sequence[Form], sizes: Sequence[int], rows: Runs, device_count: int) -> tuple[Part, ...] | None:
    """The parts of a matrix, of which devices have these rows; None where they do not lie alike on every device.

    Args:
      forms, sizes: of the parts, from the top.
    """
    share = sum(run.count for run in rows) // device_count
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    of_parts: list[list[Run]] = [[] for _ in sizes]
    counts: list[list[int]] = [[0] * device_count for _ in sizes]
    at = last = 0
    for run in rows:
        if run.start is None:
            return None     # zeros belong to no part
        start, stop = run.start, run.start + run.count
        while start < stop:
            index = next(index for index, end in enumerate(ends) if start < end)
            device, place = divmod(at, share)
            if place and index < last:
                return None
            count = min(stop, ends[index], start + share - place) - start
            of_parts[index].append(Run(start - (ends[index] - sizes[index]), count))
            counts[index][device] += count
            start, at, last = start + count, at + count, index
    if any(len(set(of_device)) > 1 for of_device in counts):
        return None
    return tuple(Part(form=form, rows=tuple(runs)) for form, runs in zip(forms, of_parts, strict=True))


def abstract(parts: Sequence[Part], leaf: jax.ShapeDtypeStruct, columns: Runs, device_count: int) -> JoinedTensor:
    """What a matrix becomes as shapes and placements; `leaf` is the plain one over all devices."""
    return JoinedTensor(parts=tuple(
        packed.abstract(part.form, jax.ShapeDtypeStruct(
            (sum(run.count for run in part.rows), leaf.shape[1]), leaf.dtype, sharding=leaf.sharding
        ), columns, device_count) for part in parts
    ))


def make(
    like: JoinedTensor, parts: Sequence[Part], codes: Sequence[Packable], columns: Runs, cut: Cut,
    empty: Callable[..., Host],
) -> JoinedTensor:
    """The tensor on its devices; see `packed.make`."""
    made: list[Any] = [
        packed.make(tensor, of_part, (part.rows, columns), cut, empty)
        for tensor, part, of_part in zip(like.parts, parts, codes, strict=True)
    ]
    return JoinedTensor(parts=tuple(made))
