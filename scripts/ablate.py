#!/usr/bin/env python3
"""Measures what the engine's switches do: a grid of them times workloads, cells in turn, repeated.

Every cell is a real server, started anew in every repeat and loaded by bench_serving.py once all its programs are
there. results.jsonl in the output folder is the state: a run that was interrupted goes on where it stopped.
Invariant: a row is written only once its load has ended, and a row of other settings, versions or prompts never counts.

    python scripts/ablate.py --config configs/ablations/static-batching.yaml
    python scripts/ablate.py --config configs/ablations/chunk-budget.yaml --model FOLDER --repeats 5 --output results
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_serving
import httpx
from ablation_plan import Cell, Measurement, Plan, read_plan
from ablation_report import Found, write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jaxserve
from jaxserve.core.errors import ConfigError

ROOT = Path(__file__).parents[1]
MACHINE = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
START_S_MAX, STOP_S_MAX = 1800.0, 60.0
WARMUP_SEED = 1 << 40      # far from those of the measurements, whose prompts must not be in the prefix cache
VERSIONS = {"jaxserve": jaxserve.__version__, "jax": importlib.metadata.version("jax")}


class CellError(Exception):
    """A cell could not be measured; the others go on."""


def main() -> None:
    options = _options()
    try:
        plan = read_plan(options.config, model=options.model, repeats=options.repeats)
        _need_matplotlib()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    folder = options.output or Path("ablations") / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # so that no server is left behind
    try:
        failures = run(plan, folder, options.compilation_cache_dir)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    paths = write_report(folder, plan, read_results(folder, plan))
    print("\n".join(map(str, paths)))
    if failures:
        sys.exit(f"error: {failures} measurements failed; see {folder / 'summary.md'}. The same command tries again")


def run(plan: Plan, folder: Path, cache: Path | None) -> int:
    """Measures what is missing; returns how many measurements failed."""
    found = read_results(folder, plan)
    done = {key for key, row in found.items() if "figures" in row}
    failures = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = len(plan.cells) * len(plan.workloads) * plan.repeats
        task = progress.add_task(plan.name, total=total, completed=len(done))
        for repeat, cell in plan.rounds():
            loads = plan.measurements(repeat, cell)
            wanted = [one for one in loads if (cell.name, one.workload.name, repeat) not in done]
            if not wanted:
                continue
            progress.update(task, description=f"repeat {repeat + 1}/{plan.repeats}: {cell.name or plan.name}")
            for row in _measured(plan, cell, wanted, folder, cache):
                failures += "error" in row
                _append(folder / "results.jsonl", row)
                progress.advance(task)
    return failures


def _measured(
    plan: Plan, cell: Cell, wanted: list[Measurement], folder: Path, cache: Path | None
) -> Iterator[dict[str, Any]]:
    """Rows of one start of a cell's server; an error is a row, too."""
    rest = list(wanted)
    try:
        with serving(plan.model, cell, folder / "server.log", cache) as (url, start_s):
            while rest:
                load = round(os.getloadavg()[0], 2)
                figures = measure(url, rest[0], plan.warmup)
                yield {**identity(plan, rest.pop(0)), "machine": MACHINE, "at": time.strftime("%F %T"),
                       "load_average": load, "start_s": round(start_s, 2), "figures": figures}
    except (CellError, httpx.HTTPError) as error:
        for one in rest:
            yield {**identity(plan, one), "error": str(error) or type(error).__name__}


def measure(url: str, one: Measurement, warmup: int) -> dict[str, float]:
    """One load after its warm-up; the server's own counters are those of the load alone."""
    options = one.workload.options()
    if warmup:
        first = argparse.Namespace(**{**vars(options), "num_prompts": warmup, "request_rate": 0.0})
        asyncio.run(bench_serving.run_load(url, first, WARMUP_SEED + one.seed))
    before = _counters(url)
    figures = asyncio.run(bench_serving.run_load(url, options, one.seed))
    after = _counters(url)
    if figures["failed"]:
        raise CellError(f"{figures['failed']:.0f} of {options.num_prompts} requests failed; see server.log")
    spent = {name: after[name] - before[name] for name in after}
    return figures | {
        "prefix_hit_rate": round(spent["hits"] / spent["queries"], 4) if spent["queries"] else 0.0,
        "preemptions": spent["preemptions"], "compiled_after_ready": spent["compiled"],
    }


@contextmanager
def serving(model: str, cell: Cell, log: Path, cache: Path | None) -> Iterator[tuple[str, float]]:
    """A server of the cell with all its programs: its address, and the seconds until then."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.serve", "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    command += cell.words() + (["--compilation-cache-dir", str(cache)] if cache else [])
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": search}
        )
    try:
        while not re.search(r"\bready: \d+ programs", text := log.read_text(errors="replace")):
            if process.poll() is not None:
                raise CellError(f"the server ended with {process.returncode}: {text.strip()[-500:]}")
            if time.monotonic() - begin > START_S_MAX:
                raise CellError(f"the server was not ready after {START_S_MAX:.0f} s: {text.strip()[-500:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", time.monotonic() - begin
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _counters(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    names = {
        "hits": "vllm:prefix_cache_hits_total", "queries": "vllm:prefix_cache_queries_total",
        "preemptions": "vllm:num_preemptions_total", "compiled": "jaxserve:compilations_after_ready_total",
    }
    return {
        short: sum(map(float, re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)))
        for short, name in names.items()
    }


# The state.

def identity(plan: Plan, one: Measurement) -> dict[str, Any]:
    """What makes two measurements the same one."""
    return {
        "model": plan.model, "flags": dict(one.cell.flags), "workload": one.workload.name,
        "load": dict(one.workload.settings), "warmup": plan.warmup, "repeat": one.repeat, "seed": one.seed,
        "versions": VERSIONS,
    }


def read_results(folder: Path, plan: Plan) -> Found:
    """The newest row of each measurement of the plan; a torn last line is as good as none."""
    path = folder / "results.jsonl"
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[_key(row)] = row
    found: Found = {}
    for repeat, cell in plan.rounds():
        for one in plan.measurements(repeat, cell):
            row = rows.get(_key(identity(plan, one)))
            if row is not None:
                found[cell.name, one.workload.name, repeat] = row
    return found


def _key(row: dict[str, Any]) -> str:
    names = ("model", "flags", "workload", "load", "warmup", "repeat", "seed", "versions")
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def _append(path: Path, row: dict[str, Any]) -> None:
    """One whole line, after a newline where an interruption left half of one."""
    is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if is_torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install it with: pip install 'jaxserve[research]'") from error


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a file of configs/ablations, or your own")
    parser.add_argument("--output", type=Path, help="folder of results and report; default: ablations/NAME")
    parser.add_argument("--model", help="instead of the file's: a folder or a hub name")
    parser.add_argument("--repeats", type=int, help="instead of the file's; more of them go on from those there are")
    parser.add_argument("--compilation-cache-dir", type=Path, help="the servers' cache of compiled programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
