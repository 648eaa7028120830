"""A trace of steps whose names read like the source: `layer_3/attention.qkv/dot_general` instead of `fusion.17`.

jax's trace names what XLA made of a program; which part of the model that came from is in the compiled program. This
file joins the two, for `bench_step.py --profile FOLDER`, and sums the time by scope.
Invariant: an operation counts only for the time in which none of those it called was running.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jaxserve.runner.compile import Executable

MODULE = re.compile(r"^HloModule ([\w.-]+)", re.MULTILINE)
NAMED = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]+)"', re.MULTILINE)
LAYER = re.compile(r"layer_\d+/")

Scopes = dict[tuple[str, str], str]     # by module and operation


def scopes_of(executables: Iterable[Executable]) -> Scopes:
    """Where in the source each operation comes from."""
    scopes: Scopes = {}
    for executable in executables:
        text = executable.as_text() or ""
        module = MODULE.search(text)
        if module is not None:
            scopes |= {(module[1], op): _scope(path) for op, path in NAMED.findall(text)}
    return scopes


def profiled(turn: Callable[[], object], count: int, folder: Path, scopes: Scopes) -> dict[str, dict[str, float]]:
    """Traces `count` turns into `folder`; returns milliseconds a turn by program and scope, layers added up."""
    with TemporaryDirectory() as raw:
        with _traced(raw):
            for number in range(count):
                with jax.profiler.StepTraceAnnotation("step", step_num=number):
                    turn()
        (path,) = Path(raw).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    trace["traceEvents"] = [event for event in trace["traceEvents"] if not event.get("name", "").startswith("end: ")]
    operations = [event for event in trace["traceEvents"] if "hlo_op" in event.get("args", {})]
    for event in operations:
        arguments = event["args"]
        event["name"] = scopes.get((arguments["hlo_module"], arguments["hlo_op"]), event["name"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.trace.json.gz").write_bytes(gzip.compress(json.dumps(trace).encode()))
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event, own_us in _own_times(operations):
        sums[event["args"]["hlo_module"].removeprefix("jit_")][LAYER.sub("", event["name"])] += own_us / 1e3 / count
    return {program: dict(sorted(of.items(), key=lambda item: -item[1])) for program, of in sorted(sums.items())}


def _scope(path: str) -> str:
    """`jit(forward_T4)/Decoder/layer_0/mlp.down/dot_general` without what jax puts around it."""
    parts = [part for part in path.split("/") if not part.startswith("jit(")]
    return "/".join(parts) or path


@contextmanager
def _traced(folder: str) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0     # every Python call would cost more than what it measures
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def _own_times(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with its microseconds less those of the events inside it on the same thread."""
    open_events: dict[tuple[Any, Any], list[list[Any]]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = open_events[event["pid"], event["tid"]]
        while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
            yield tuple(stack.pop())
        if stack:
            stack[-1][1] -= event["dur"]
        stack.append([event, event["dur"]])
    for stack in open_events.values():
        yield from map(tuple, stack)
