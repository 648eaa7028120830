"""A weight in packed form: a pytree that stands where a plain matrix would, and knows how it is multiplied.

Layers ask `isinstance(weight, QTensor)` in one place (`layers.linear`) and otherwise do not know. Its leaves are what
is loaded, placed and passed to programs.
Invariant: `matmul` and `take` give what the scheme's documentation says, whatever the number of rows.
"""

from __future__ import annotations

import abc

from jax import Array
from jax.typing import DTypeLike

from jaxserve.sharding import collectives


class QTensor(abc.ABC):
    """A packed matrix [out, in]."""

    __slots__ = ()

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the matrix it stands for, more of a stack."""

    @abc.abstractmethod
    def matmul(self, x_TI: Array, axis: str | None = None) -> Array:
        """x · weightᵀ, float32 [T, O]; `axis` is the logical name of the inputs, which devices may share."""

    def matmul_total(self, x_TI: Array, axis: str, dtype: DTypeLike) -> Array:
        """The same, added up over the devices that share the inputs; sent as `dtype`."""
        return collectives.total(self.matmul(x_TI, axis), axis, dtype)

    @abc.abstractmethod
    def take(self, id_T: Array) -> Array:
        """Rows of the matrix, float32 [T, I]: embeddings."""
