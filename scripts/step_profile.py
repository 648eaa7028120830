"""A trace of steps whose names read like the source: `layer_3/attention.qkv/dot_general` instead of `fusion.17`.

For `bench_step.py --profile FOLDER`: traces steps, names their operations and sums the time by scope.
Invariant: an operation counts only for the time in which none of those it called was running. On a GPU that is what its
streams ran: other lines of a trace say the same again, and kernels of command buffers have no operation's name there.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jaxserve.runner.trace import Scopes, rename

LAYER = re.compile(r"layer_\d+/")


GPU, STREAM = "/device:GPU", "Stream #"      # how a trace's processes and threads are named
OTHER = "command buffers and copies"         # what no program's operation is named for


def profiled(turn: Callable[[], object], count: int, folder: Path, scopes: Scopes) -> dict[str, dict[str, float]]:
    """Traces `count` turns into `folder`; returns milliseconds a turn by program and scope, layers added up."""
    return by_scope(traced(turn, count, folder, scopes), count)


def traced(turn: Callable[[], object], count: int, folder: Path, scopes: Scopes) -> list[dict[str, Any]]:
    """What the device ran in `count` turns, named; the whole trace lies in `folder`."""
    with TemporaryDirectory() as raw:
        with _traced(raw):
            for number in range(count):
                with jax.profiler.StepTraceAnnotation("step", step_num=number):
                    turn()
        (path,) = Path(raw).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    operations = rename(trace, scopes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.trace.json.gz").write_bytes(gzip.compress(json.dumps(trace).encode()))
    return on_streams(trace["traceEvents"]) or operations


def on_streams(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ran on a GPU's streams, kernels and copies; nothing of a trace without a GPU."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    streams = {
        key for key, name in threads.items()
        if name.startswith(STREAM) and processes.get(key[0], "").startswith(GPU)
    }
    return [event for event in events if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams]


def busy_ms(operations: list[dict[str, Any]], count: int) -> float:
    """Milliseconds a turn in which anything ran."""
    busy_us = end_us = 0.0
    for event in sorted(operations, key=lambda event: event["ts"]):
        stop_us = event["ts"] + event["dur"]
        busy_us += max(0.0, stop_us - max(end_us, event["ts"]))
        end_us = max(end_us, stop_us)
    return busy_us / 1e3 / count


def by_scope(operations: list[dict[str, Any]], count: int) -> dict[str, dict[str, float]]:
    """Milliseconds a turn by program and scope, layers added up."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event, own_us in _own_times(operations):
        program = event.get("args", {}).get("hlo_module", OTHER).removeprefix("jit_")
        sums[program][LAYER.sub("", event["name"])] += own_us / 1e3 / count
    return {program: dict(sorted(of.items(), key=lambda item: -item[1])) for program, of in sorted(sums.items())}


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
