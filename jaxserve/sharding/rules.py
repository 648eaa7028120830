"""One table: logical axis of a parameter -> mesh axis. The models name axes, only this file knows where they go.

Invariant: a logical axis that is not in the table is an error, never silently replicated.
"""

from __future__ import annotations

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.sharding.mesh import MODEL

LOGICAL_AXES: dict[str, str | None] = {
    "vocab": MODEL,      # rows of the embedding and of the head
    "heads": MODEL,      # rows of fused q, k, v; columns of the attention's output projection
    "mlp": MODEL,        # rows of fused gate and up; columns of down
    "experts": None,     # whole experts are not shared out yet; their widths are
    "latent": None,      # compressed keys, values and queries of latent attention
    "width": None,       # the residual stream is whole on every device
    "position": None,    # learned positions
}


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Placement of an array whose axes have these logical names."""
    return NamedSharding(mesh, PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes)))
