"""The device mesh: which devices work together, and along which axis. Knows nothing of models.

Invariant: every mesh has the axes "data" and "model", in this order; a size of 1 is an axis too.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxserve.core.errors import ConfigError

DATA, MODEL = "data", "model"


def make_mesh(devices: Sequence[jax.Device], tensor_parallel_size: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first `tensor_parallel_size` devices: one replica of the model."""
    if not 1 <= tensor_parallel_size <= len(devices):
        raise ConfigError(
            f"tensor-parallel-size {tensor_parallel_size} does not fit the {len(devices)} device(s) there are; "
            f"use 1 to {len(devices)}"
        )
    return jax.sharding.Mesh(np.array(devices[:tensor_parallel_size]).reshape(1, -1), (DATA, MODEL))
