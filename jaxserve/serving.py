"""Engines behind one router and the text engine over them: a server without the port it listens on.

Whoever listens (`jaxserve.serve`, `jaxserve.replicas`) makes an app of `state`, runs `run` beside it, and winds down.
Invariant: engine processes are started at once, so that they import jax while the rest is built.
"""

from __future__ import annotations

import asyncio
import logging

from jaxserve.core.config import ServeConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.router import EngineRouter
from jaxserve.supervisor import Supervisor, keep_alive
from jaxserve.visible_devices import engine_environment

logger = logging.getLogger("jaxserve.serve")


class Serving:
    """One server's engines and state. Mutable: owns the engine processes."""

    def __init__(self, config: ServeConfig) -> None:
        parallel = config.engine.parallel
        self._config = config
        self._supervisors = [
            Supervisor(
                AsyncEngine(queue_max=config.engine.scheduler.max_num_queued_reqs), config.engine,
                log_level=config.frontend.log_level, environment=engine_environment(parallel, index),
            )
            for index in range(parallel.data_parallel_size)
        ]
        self._channels = [supervisor.spawn() for supervisor in self._supervisors]
        self.engine = EngineRouter(
            [supervisor.engine for supervisor in self._supervisors],
            follows_prefixes=config.engine.cache.enable_prefix_caching,
        )
        from jaxserve.server.state import ServerState  # FastAPI and the rest, while the engines import jax

        self.state = ServerState(config=config, engine=self.engine)

    async def run(self) -> None:
        """Until the engines were stopped. Raises EngineGaveUpError when none can be had (any more)."""
        await keep_alive(self._supervisors, self._channels)

    async def open_text(self) -> None:
        """Once an engine says which folder it serves: the tokenizer and the text engine, off the event loop."""
        from jaxserve.text_engine import open_text_engine

        await self.engine.wait_serving()
        assert self.engine.folder is not None
        config = self._config
        self.state.text_engine = await asyncio.to_thread(
            open_text_engine, self.engine, self.engine.folder, config.engine.model, config.frontend.chat_template,
            config.engine.load.download_dir,
        )

    async def wind_down(self) -> None:
        """Refuses new work, lets what runs finish within --shutdown-timeout, aborts the rest, ends the processes."""
        for one in self.engine.engines:
            if one.status.phase != "dead":
                one.status.phase, one.status.detail = "draining", "the server is shutting down"
        finish_s = self._config.frontend.shutdown_timeout
        if self.engine.live_count and finish_s > 0:
            logger.info("finishing %d requests within %d s", self.engine.live_count, finish_s)
            await asyncio.gather(*(one.wait_idle(finish_s) for one in self.engine.engines))
        for one in self.engine.engines:
            one.abort_all("the server is shutting down")
        await asyncio.gather(*(supervisor.stop() for supervisor in self._supervisors))
