"""How a process of several finds the others: from the configuration to a `Leader` or a `Follower`.

Invariant: the settings that processes compare are all that must be equal, and nothing that may differ: paths, tokens,
and which process this is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from jaxserve.cluster.handshake import cluster_secret
from jaxserve.cluster.members import Follower, Leader, follow, lead
from jaxserve.core.config import EngineConfig, SpeculativeConfig

OWN = {     # may differ from machine to machine
    "model", "tokenizer", "hf_token", "download_dir", "compilation_cache_dir", "node_rank", "generation_config",
}


def open_leader(
    config: EngineConfig, on_lost: Callable[[str], None], on_waiting: Callable[[str], None]
) -> Leader:
    """Waits for the others. Raises ConfigError where they cannot come."""
    return lead(
        _channel(config), config.parallel.nnodes, secret=cluster_secret(), settings=settings(config), on_lost=on_lost,
        on_waiting=on_waiting,
    )


def open_follower(config: EngineConfig, on_lost: Callable[[str], None]) -> Follower:
    """Joins process 0. Raises ConfigError where that cannot be."""
    return follow(
        _channel(config), config.parallel.node_rank, config.parallel.nnodes, secret=cluster_secret(),
        settings=settings(config), on_lost=on_lost,
    )


def settings(config: EngineConfig) -> dict[str, str]:
    """What all processes must have been started with, by flag."""
    found = {f"the version of {name}": _version(name) for name in ("jaxserve", "jax", "jaxlib")}
    for part in dataclasses.fields(config):
        values = getattr(config, part.name)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if isinstance(value, SpeculativeConfig) and value.model is not None:
                value = dataclasses.replace(value, model="...")      # a path; what is in it is compared later
            if field.name not in OWN:
                found[field.name.replace("_", "-")] = repr(value)
    return found


def _channel(config: EngineConfig) -> tuple[str, int]:
    return config.parallel.master_addr, config.parallel.master_port + 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:    # a source tree on the path, not installed
        return "unknown"
