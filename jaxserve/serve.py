"""`python -m jaxserve.serve`: flags and YAML to a server. The API process: HTTP and text; no jax here.

Order matters for the first second: flags (light), the port (so that a taken one is an error at once), the engine
process (it imports jax meanwhile), then HTTP, which answers /health while the engine starts, then text.
Exit status: 0 after a stop that was asked for, 1 when the engine cannot be had, 2 for a wrong flag.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.flags import parse_serve_args
from jaxserve.logs import configure_logging
from jaxserve.visible_devices import engine_environment

if TYPE_CHECKING:
    import uvicorn

    from jaxserve.serving import Serving

logger = logging.getLogger("jaxserve.serve")

LAST_WORD_S = 1.5        # /health says 503 and why, before a server that leaves the restart to others ends
HTTP_STOP_S_MAX = 10.0   # for replies on their way and the lifespan's end, once the engine is gone


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a server until a signal or a fatal error. Returns the exit status."""
    try:
        config = parse_serve_args(sys.argv[1:] if argv is None else argv)
        if config.engine.parallel.node_rank > 0:
            return _follow(config)
        engine_environment(config.engine.parallel, 0)     # refuses more devices than there are
        sock = _bind(config)
    except ConfigError as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        return 2
    configure_logging(config.frontend.log_level)
    try:
        import uvloop
    except ImportError:   # not on every platform; asyncio's own loop serves as well, slower
        return asyncio.run(_serve(config, sock))
    return uvloop.run(_serve(config, sock))


def _follow(config: ServeConfig) -> int:
    """Any process of several but the first: no HTTP, no text; it computes what the first one tells it to."""
    from jaxserve.follower import run

    configure_logging(config.frontend.log_level)
    return run(config.engine)


def _bind(config: ServeConfig) -> socket.socket:
    """The listening socket. Raises ConfigError naming the address when it cannot be had."""
    frontend = config.frontend
    if frontend.uds is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: object = frontend.uds
    else:
        family = socket.AF_INET6 if ":" in frontend.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (frontend.host, frontend.port)
    try:
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        where = f"--uds {frontend.uds}" if frontend.uds else f"--host {frontend.host} --port {frontend.port}"
        raise ConfigError(f"cannot listen on {where}: {error}; choose another address") from error
    return sock


async def _serve(config: ServeConfig, sock: socket.socket) -> int:
    from jaxserve.serving import Serving

    serving = Serving(config)
    from jaxserve.server.app import create_app

    server = _http_server(create_app(serving.state), config)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(server.serve(sockets=[sock]), name="http"),
        asyncio.create_task(serving.run(), name="engine"),
        asyncio.create_task(_open_text(serving, config), name="text"),
        asyncio.create_task(stop.wait(), name="stop"),
    ]
    status = 0
    try:
        await _until_over(tasks)
    except JaxserveError as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        status = 1
        if config.engine.parallel.nnodes > 1:
            await asyncio.sleep(LAST_WORD_S)
    await serving.wind_down()
    if config.frontend.uds is not None and os.path.exists(config.frontend.uds):
        os.unlink(config.frontend.uds)
    server.should_exit = True
    await asyncio.wait(tasks[:1], timeout=HTTP_STOP_S_MAX)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return status


async def _until_over(tasks: list[asyncio.Task[object]]) -> None:
    """Returns when a stop was asked for or HTTP ended; raises what any task raised."""
    running = set(tasks)
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if any(task.get_name() != "text" for task in done):
            return


async def _open_text(serving: Serving, config: ServeConfig) -> None:
    await serving.open_text()
    scheme = "https" if config.frontend.ssl_certfile else "http"
    where = f"unix:{config.frontend.uds}" if config.frontend.uds else f"{scheme}://{config.frontend.host}:{config.frontend.port}"
    logger.info("serving %s on %s", ", ".join(serving.state.served_names), where)


def _http_server(app: object, config: ServeConfig) -> uvicorn.Server:
    import uvicorn

    frontend = config.frontend

    class Server(uvicorn.Server):
        """uvicorn without its own signal handlers: stopping drains first, see `Serving.wind_down`."""

        def capture_signals(self):
            from contextlib import nullcontext

            return nullcontext()

    return Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_level="warning", access_log=False, lifespan="on", root_path=frontend.root_path,
            ssl_keyfile=frontend.ssl_keyfile, ssl_certfile=frontend.ssl_certfile, timeout_graceful_shutdown=5,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
