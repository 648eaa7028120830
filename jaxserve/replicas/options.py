"""What an application of replicas is asked to be: scaling of its own, and any flag of a server. Knows no Ray.

Values come as `serve run` gives them, texts, or as YAML and Python do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.flags.build import serve_config
from jaxserve.flags.config_file import read_config, strict_loader
from jaxserve.flags.names import find

# Of a server that listens itself, or that is more than one engine.
NOT_HERE = {
    "host": "Ray Serve listens: `serve start --http-host`, or http_options in its config file",
    "port": "Ray Serve listens: `serve start --http-port`, or http_options in its config file",
    "uds": "Ray Serve listens on a port",
    "ssl-certfile": "put TLS in front of Ray Serve", "ssl-keyfile": "put TLS in front of Ray Serve",
    "root-path": "give the application a route_prefix",
    "data-parallel-size": "replicas are what Ray Serve counts: min-replicas and max-replicas",
    "nnodes": "a replica is one process on one machine", "node-rank": "a replica is one process on one machine",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How many replicas, when there are more, and what each takes of the cluster.

    Attributes:
      target_ongoing_requests: of a replica, running and waiting: more of them bring another replica.
      max_ongoing_requests: of a replica; what is more waits in front.
      prefix_routing: a request goes where its beginning was computed; else to the idlest.
      num_cpus, num_gpus: of the cluster's for a replica; num_gpus None is the tensor-parallel size where the cluster
        has GPUs, and 0 where it has none.
      fronts: processes that take requests.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 32.0
    max_ongoing_requests: int = 512
    prefix_routing: bool = True
    num_cpus: float = 1.0
    num_gpus: float | None = None
    fronts: int = 1


SCALING = {field.name: field for field in dataclasses.fields(Scaling)}


def read_options(arguments: Mapping[str, Any]) -> tuple[Scaling, ServeConfig]:
    """The scaling, and the configuration of every replica's server. Raises ConfigError."""
    own, flags, raw = {}, {}, {}
    for key, value in arguments.items():
        name = str(key).replace("-", "_")
        if name == "config":
            raw = read_config(str(value))
        elif name in SCALING:
            own[name] = _scaling_value(name, value)
        else:
            flag, is_off = find(str(key), where="key")
            value = _parsed(value) if flag.kind == "bool" else value
            flags[flag.name] = not value if is_off else value
    for name in flags:
        if name in NOT_HERE:
            raise ConfigError(f"{name} has no place here: {NOT_HERE[name]}")
    raw = {name: value for name, value in raw.items() if name not in NOT_HERE} | flags
    own.setdefault("max_replicas", max(own.get("min_replicas", 1), 1))
    scaling = Scaling(**own)
    _check(scaling)
    return scaling, serve_config(raw)


def _parsed(value: Any) -> Any:
    """A text as YAML reads it."""
    import yaml

    return yaml.load(value, strict_loader()) if isinstance(value, str) else value


def _scaling_value(name: str, value: Any) -> Any:
    kind, parsed = str(SCALING[name].type).split(" |")[0], _parsed(value)
    if kind == "bool":
        fits = isinstance(parsed, bool)
    else:
        fits = isinstance(parsed, int if kind == "int" else (int, float)) and not isinstance(parsed, bool)
    if not fits:
        raise ConfigError(f"{name} must be {'true or false' if kind == 'bool' else f'of type {kind}'}, got {value!r}")
    return parsed


def _check(scaling: Scaling) -> None:
    for name, least in (("min_replicas", 0), ("max_replicas", 1), ("max_ongoing_requests", 1), ("fronts", 1)):
        if getattr(scaling, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(scaling, name)}")
    if scaling.target_ongoing_requests <= 0:
        raise ConfigError(f"target_ongoing_requests must be above 0, got {scaling.target_ongoing_requests}")
    if scaling.max_replicas < scaling.min_replicas:
        raise ConfigError(
            f"max_replicas {scaling.max_replicas} is below min_replicas {scaling.min_replicas}; raise it or lower that"
        )
    if scaling.num_cpus < 0 or (scaling.num_gpus or 0) < 0:
        raise ConfigError(f"num_cpus and num_gpus must not be negative, got {scaling.num_cpus} and {scaling.num_gpus}")
