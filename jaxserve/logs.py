"""Logging for both processes: one line a record, to stderr, level by `--log-level`. No colours, no telemetry."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def configure_logging(level: str) -> None:
    """Sends jaxserve's records to stderr from `level` up; other libraries' from warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("jaxserve").setLevel(level.upper())
