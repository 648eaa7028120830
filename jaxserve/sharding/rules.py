"""One table: logical axis of an array -> mesh axes. The models name axes, only this file knows where they go.

Invariant: a logical axis that is not in the table is an error, never silently replicated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.sharding.mesh import EXPERT, MODEL

ALL = (MODEL, EXPERT)

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "vocab": ALL,                   # rows of the embedding and of the head
    "qkv": ALL,                     # rows of fused q, k, v
    "heads": ALL,                   # query heads: columns of the attention's output projection
    "kv_heads": ALL,                # of pages
    "gate_up": ALL,                 # rows of fused gate and up
    "mlp": ALL,                     # rows of up, columns of down
    "experts": (EXPERT,),           # whole experts
    "expert_gate_up": (MODEL,),     # the same as gate_up and mlp, of every expert
    "expert_mlp": (MODEL,),
    "samples": ALL,                 # rows that sample, once their logits are whole
    "latent": (),                   # compressed keys, values and queries of latent attention
    "width": (),                    # the residual stream is whole on every device
    "position": (),                 # learned positions
}


def parts(mesh: Mesh, axis: str | None) -> int:
    """Into how many parts a logical axis is cut."""
    return 1 if axis is None else math.prod(mesh.shape[name] for name in LOGICAL_AXES[axis])


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Placement of an array whose axes have these logical names."""
    return NamedSharding(mesh, PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] or None for axis in axes)))


def joined_shape(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape over all devices of an array that has `shape` on each."""
    return tuple(size * parts(mesh, axis) for axis, size in zip(axes, shape, strict=True))
