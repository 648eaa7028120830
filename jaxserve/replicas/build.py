"""The application that Ray Serve deploys: fronts, and replicas behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application

from jaxserve.core.config import ServeConfig
from jaxserve.replicas.front import Front
from jaxserve.replicas.options import Scaling, read_options
from jaxserve.replicas.replica import Replica
from jaxserve.replicas.routing import PrefixRouter

DRAIN_S = 15.0              # beyond --shutdown-timeout, for the processes themselves
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 10.0
STATS_PERIOD_S = 5.0
WAITING_MAX = 100_000       # requests of a front that no replica has taken yet


def application(arguments: Mapping[str, Any]) -> Application:
    """See `jaxserve.replicas.build_app`."""
    scaling, config = read_options(arguments)
    replicas = serve.deployment(**_replica_options(scaling, config))(Replica).bind(config)
    return serve.deployment(
        name="front", num_replicas=scaling.fronts, max_ongoing_requests=WAITING_MAX,
        ray_actor_options={"num_cpus": 0}, health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S, graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.frontend.shutdown_timeout + 2 * DRAIN_S,     # it outlives its replicas
    )(serve.ingress()(Front)).bind(replicas)


def _replica_options(scaling: Scaling, config: ServeConfig) -> dict[str, Any]:
    gpus = scaling.num_gpus
    if gpus is None:
        has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        gpus = config.engine.parallel.tensor_parallel_size if has_gpus else 0
    options: dict[str, Any] = {
        "name": "replica",
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": scaling.num_cpus, "num_gpus": gpus},
        "graceful_shutdown_timeout_s": config.frontend.shutdown_timeout + DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "request_router_config": RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"follows_prefixes": scaling.prefix_routing},
            request_routing_stats_period_s=STATS_PERIOD_S,
        ),
    }
    if scaling.min_replicas == scaling.max_replicas:
        return options | {"num_replicas": scaling.min_replicas}
    return options | {"autoscaling_config": AutoscalingConfig(
        min_replicas=scaling.min_replicas, max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_ongoing_requests,
    )}
