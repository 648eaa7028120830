"""The device mesh: which devices work together, and along which axes. Knows nothing of models.

"model" cuts matrices, "expert" hands out whole experts; what is no expert is cut along both together.
Invariant: every mesh has the axes "data", "model" and "expert", in this order; a size of 1 is an axis too.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxserve.core.errors import ConfigError

DATA, MODEL, EXPERT = "data", "model", "expert"


def make_mesh(
    devices: Sequence[jax.Device], tensor_parallel_size: int = 1, *, has_whole_experts: bool = False
) -> jax.sharding.Mesh:
    """A mesh over the first `tensor_parallel_size` devices: one replica of the model.

    Args:
      has_whole_experts: each device has some experts whole, instead of a part of every expert.
    """
    if not 1 <= tensor_parallel_size <= len(devices):
        raise ConfigError(
            f"tensor-parallel-size {tensor_parallel_size} does not fit the {len(devices)} device(s) there are; "
            f"use 1 to {len(devices)}"
        )
    shape = abstract_mesh(tensor_parallel_size, has_whole_experts=has_whole_experts).axis_sizes
    return jax.sharding.Mesh(np.array(devices[:tensor_parallel_size]).reshape(shape), (DATA, MODEL, EXPERT))


def abstract_mesh(tensor_parallel_size: int, *, has_whole_experts: bool = False) -> jax.sharding.AbstractMesh:
    """The same mesh of devices that need not be there."""
    shape = (1, 1, tensor_parallel_size) if has_whole_experts else (1, tensor_parallel_size, 1)
    return jax.sharding.AbstractMesh(shape, (DATA, MODEL, EXPERT), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def want_cpu_devices(count: int) -> None:
    """Asks for `count` devices on a machine without accelerators; must come before jax first looks for devices.

    They are this one processor, so they compute no faster than one: a way to try what many devices do.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass    # jax has found its devices already: `make_mesh` says whether they are enough
