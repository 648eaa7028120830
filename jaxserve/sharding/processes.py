"""jax over several processes: the coordinator, collectives between machines, and which devices each process gives.

Must run before jax looks for devices. Knows addresses and counts; nothing of models, plans or our own channel.
Invariant: every process sees the same devices in the same order, equally many of each process.
"""

from __future__ import annotations

import jax

from jaxserve.core.errors import ConfigError

START_S_MAX = 300


def join_processes(address: str, port: int, *, rank: int, count: int) -> None:
    """Connects this process with the others; process 0 is the coordinator, on `address` only."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        jax.distributed.initialize(
            shown, count, rank, coordinator_bind_address=shown, initialization_timeout=START_S_MAX,
            cluster_detection_method="deactivate",
        )
    except RuntimeError as error:
        raise ConfigError(
            f"the processes do not find each other at {shown}: {error}; master-port must be free on node-rank 0 and "
            "open for the others"
        ) from error


def devices_of_all(per_process: int) -> list[jax.Device]:
    """The first devices of every process, process by process."""
    found: list[jax.Device] = []
    for rank in range(jax.process_count()):
        own = [device for device in jax.devices() if device.process_index == rank]
        if len(own) < per_process:
            raise ConfigError(
                f"tensor-parallel-size wants {per_process} devices of each of {jax.process_count()} processes, and "
                f"node-rank {rank} has {len(own)}; lower it, or raise nnodes"
            )
        found += own[:per_process]
    return found
