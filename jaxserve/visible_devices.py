"""Which of a machine's devices each of several engine processes sees. No jax: the drivers' own variables say it.

Invariant: two engines of one server never share an accelerator.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from jaxserve.core.config import ParallelConfig
from jaxserve.core.errors import ConfigError

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
DRIVER = Path("/proc/driver/nvidia/gpus")       # a folder a GPU, where NVIDIA's driver is


def engine_environment(
    parallel: ParallelConfig, index: int, *, environment: Mapping[str, str] = os.environ, driver: Path = DRIVER
) -> dict[str, str]:
    """The variables of engine number `index`; none where there is one engine only. On CPUs they mean nothing.

    Raises ConfigError where there are fewer devices than the engines need.
    """
    engines, each = parallel.data_parallel_size, parallel.tensor_parallel_size
    if engines == 1:
        return {}
    there = list(driver.iterdir()) if driver.is_dir() else None
    found = {}
    for name in VARIABLES:
        given = environment.get(name)
        names = [part.strip() for part in given.split(",")] if given else None
        count = len(names) if names is not None else len(there) if there and name == VARIABLES[0] else None
        if count is not None and count < engines * each:
            raise ConfigError(
                f"data-parallel-size {engines} times tensor-parallel-size {each} needs {engines * each} devices; "
                f"{count} are there" + (f" ({name}={given})" if given else "")
            )
        names = names or [str(number) for number in range(engines * each)]
        found[name] = ",".join(names[index * each : (index + 1) * each])
    return found
