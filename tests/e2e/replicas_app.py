"""Run as a script: a Ray cluster of its own that serves an application of replicas until its input ends.

    python replicas_app.py PORT FOLDER '{"model": "…", "min-replicas": 2}'

Prints one line once the application serves. A line of input is other options, to be deployed in their place.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    # a busy machine with two cores starts Ray's proxy in more than the five seconds that Ray gives it
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}

import ray
from ray import serve

from jaxserve.replicas import build_app


def main() -> None:
    port, folder, options = sys.argv[1:]
    ray.init(
        num_cpus=8, include_dashboard=False, object_store_memory=80 << 20, logging_level="warning", _temp_dir=folder,
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build_app(json.loads(options)), name="jaxserve", route_prefix="/")
    print("serving", flush=True)
    for line in sys.stdin:
        serve.run(build_app(json.loads(line)), name="jaxserve", route_prefix="/")
        print("serving", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
