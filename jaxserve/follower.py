"""A process of several that does not lead: it loads its part of the model and repeats the leader's device calls.

It has no HTTP, no scheduler and no say: what must be decided, the leader decides. Signals that ask a process to stop
are left to the leader, which lets running requests finish first and then stops everybody.
Exit status: 0 when the leader stopped it, 2 for what no restart mends (flags, model, memory), else 1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from jaxserve.cluster.entry import open_follower
from jaxserve.cluster.replay import replay
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import CapacityError, ConfigError, JaxserveError, ModelError
from jaxserve.launch import build_engine
from jaxserve.progress import ConsoleProgress

logger = logging.getLogger("jaxserve.cluster")


def run(config: EngineConfig) -> int:
    """Follows until the leader stops. Returns the exit status, or ends the process when the leader is lost."""
    parallel = config.parallel
    logger.info(
        "process %d of %d: looking for the leader at %s", parallel.node_rank, parallel.nnodes, parallel.master_addr
    )
    try:
        follower = open_follower(config, _lost)
    except JaxserveError as error:
        return _say(error)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _left_to_the_leader)
    try:
        engine = build_engine(config, progress=ConsoleProgress(), member=follower)
        logger.info("process %d of %d: follows", parallel.node_rank, parallel.nnodes)
        replay(engine.runner, follower.next)
    except Exception as error:
        status = _say(error)
        follower.stop(str(error))
    else:
        logger.info("the leader has stopped")
        status = 0
    sys.stderr.flush()
    os._exit(status)    # jax would wait for the others at exit, and they are gone


def _lost(reason: str) -> None:
    logger.error("%s; this process ends", reason)
    sys.stderr.flush()
    os._exit(1)


def _say(error: Exception) -> int:
    if not isinstance(error, JaxserveError):
        logger.error("the follower failed", exc_info=error)
        return 1
    print(f"jaxserve: error: {error}", file=sys.stderr)
    return 2 if isinstance(error, (ConfigError, ModelError, CapacityError)) else 1


def _left_to_the_leader(number: int, frame: object) -> None:
    logger.info("%s is left to the leader: stop that one", signal.Signals(number).name)
