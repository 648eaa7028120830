"""Which of several processes this is: from flags, or with `--nnodes auto` from what started it; and what must hold.

Slurm, Open MPI and Kubernetes' LeaderWorkerSet tell a process its number in the environment. Only `auto` reads that:
a server inside a batch job is not part of anything unless it says so.
Invariant: node_rank < nnodes, and with nnodes above 1 there is a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxserve.cluster.handshake import cluster_secret
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError

# How many, which one, and where node 0 is; Open MPI does not say the last.
_STARTERS: tuple[tuple[str, str, str, str], ...] = (
    ("Kubernetes (LeaderWorkerSet)", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ""),
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
)


def placed(given: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Raw parallel settings with `nnodes` None (auto) filled in; what was given stands."""
    if given.get("nnodes", 1) is not None:
        return given
    for name, count, rank, address in _STARTERS:
        if count not in environment or rank not in environment:
            continue
        found: dict[str, Any] = {"nnodes": _number(environment, count), "node_rank": _number(environment, rank)}
        if where := environment.get(address):
            found["master_addr"] = _first_node(where)
        merged = found | {key: value for key, value in given.items() if value is not None}
        if "master_addr" not in merged and merged["nnodes"] > 1:
            raise ConfigError(f"nnodes auto: {name} does not say where node-rank 0 is; give --master-addr")
        return merged
    tried = ", ".join(name for name, *_ in _STARTERS)
    raise ConfigError(f"nnodes auto: the environment is that of none of {tried}; give --nnodes and --node-rank")


def check_nodes(config: EngineConfig) -> None:
    """Raises ConfigError where the processes cannot share the model."""
    parallel = config.parallel
    if parallel.node_rank >= parallel.nnodes:
        raise ConfigError(f"node-rank {parallel.node_rank} must be below nnodes, which is {parallel.nnodes}")
    if parallel.nnodes == 1:
        return
    if parallel.tensor_parallel_size % parallel.nnodes:
        raise ConfigError(
            f"tensor-parallel-size {parallel.tensor_parallel_size} counts the devices of all machines and must be a "
            f"multiple of nnodes, which is {parallel.nnodes}"
        )
    cluster_secret()


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(f"nnodes auto: {name} is {environment[name]!r}, not a number") from None


def _first_node(nodes: str) -> str:
    """The first name of Slurm's lists: `gpu[03-05,09],login1` begins with gpu03."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None, nodes
    return match[1] + (match[2] or "") + match[3]
