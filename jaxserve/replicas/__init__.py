"""Many servers behind one address, by Ray Serve: `serve run jaxserve.replicas:build_app config=qwen3b.yaml`.

Needs the extra `jaxserve[ray]`. `options` reads what is asked for, `front` takes requests and forwards them, `routing`
chooses the replica, `replica` is a whole server inside Ray's process, `forwarding` is what goes between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.core.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve.deployment import Application


def build_app(arguments: Mapping[str, Any]) -> Application:
    """The application of these keys, see `options.Scaling`; every other key is a flag of `jaxserve serve`.

    Raises ConfigError for what no server, and no replica of one, can be, and where Ray is not installed.
    """
    try:
        from jaxserve.replicas.build import application
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError("jaxserve.replicas needs Ray Serve: pip install 'jaxserve[ray]'") from error
    return application(arguments)
