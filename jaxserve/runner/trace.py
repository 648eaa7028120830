"""Traces of a running engine whose names read like the source: `layer_3/attention.qkv/dot_general`, not `fusion.17`.

jax's trace names what XLA made of a program; which part of the model that came from is in the compiled program. This
file joins the two. It knows no step and no request; `POST /start_profile` and `scripts/bench_step.py` use it.
Invariant: at most one trace runs in a process, and a folder that holds earlier traces keeps them.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxserve.core.errors import EngineError
from jaxserve.runner.compile import Executable

MODULE = re.compile(r"^HloModule ([\w.-]+)", re.MULTILINE)
NAMED = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]+)"', re.MULTILINE)

WAIT_S = 0.05

Scopes = dict[tuple[str, str], str]     # by module and operation


class Tracer:
    """Starts and stops traces below one folder. Mutable: whether one runs."""

    def __init__(self) -> None:
        self._before: set[Path] | None = None
        self._folder = Path()

    @property
    def is_running(self) -> bool:
        return self._before is not None

    def start(self, folder: Path) -> None:
        """Raises EngineError where a trace runs already or the folder cannot be written."""
        if self.is_running:
            raise EngineError("a trace is running already: stop it first")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0     # every Python call would cost more than what it measures
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = set(folder.rglob("*.trace.json.gz"))
            jax.profiler.start_trace(str(folder), profiler_options=options)
        except (OSError, RuntimeError) as error:
            raise EngineError(f"--profile {folder}: {error}") from error
        self._folder, self._before = folder, before

    def stop(self, executables: Iterable[Executable]) -> list[Path]:
        """Ends the trace; returns its files, whose operations are named by `executables`."""
        if self._before is None:
            raise EngineError("no trace is running: start one first")
        before, self._before = self._before, None
        # jax names a trace by the second in which it ends, and would write over the one of the same second.
        while (self._folder / "plugins" / "profile" / time.strftime("%Y_%m_%d_%H_%M_%S")).exists():
            time.sleep(WAIT_S)
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise EngineError(f"the trace could not be written into {self._folder}: {error}") from error
        scopes = scopes_of(executables)
        paths = sorted(set(self._folder.rglob("*.trace.json.gz")) - before)
        for path in paths:
            trace = json.loads(gzip.decompress(path.read_bytes()))
            rename(trace, scopes)
            path.write_bytes(gzip.compress(json.dumps(trace).encode()))
        return paths


def scopes_of(executables: Iterable[Executable]) -> Scopes:
    """Where in the source each operation comes from."""
    scopes: Scopes = {}
    for executable in executables:
        text = executable.as_text() or ""
        module = MODULE.search(text)
        if module is not None:
            scopes |= {(module[1], op): _scope(path) for op, path in NAMED.findall(text)}
    return scopes


def rename(trace: dict[str, Any], scopes: Scopes) -> list[dict[str, Any]]:
    """Names a trace's operations by their scopes, in place; returns those operations."""
    trace["traceEvents"] = [event for event in trace["traceEvents"] if not event.get("name", "").startswith("end: ")]
    operations = [event for event in trace["traceEvents"] if "hlo_op" in event.get("args", {})]
    for event in operations:
        arguments = event["args"]
        event["name"] = scopes.get((arguments.get("hlo_module", ""), arguments["hlo_op"]), event["name"])
    return operations


def _scope(path: str) -> str:
    """`jit(forward_T4)/Decoder/layer_0/mlp.down/dot_general` without what jax puts around it."""
    parts = [part for part in path.split("/") if not part.startswith("jit(")]
    return "/".join(parts) or path
