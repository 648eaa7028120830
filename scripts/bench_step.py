#!/usr/bin/env python3
"""Where the time of a step goes: host seconds (plan, pack, dispatch, commit) by rows, device seconds by bucket.

GB/s and GFLOP/s of each are set against what the device does at best in the same run (ceilings.py).
Turns the engine's own loop in this process, without HTTP and without text. Medians and minima; `--json` for machines.

    python scripts/bench_step.py --model ~/.cache/jaxserve/models/SmolLM2-135M-Instruct --dtype float32
    python scripts/bench_step.py --model FOLDER_WITH_CONFIG --load-format dummy --rows 1 16 64 --context 256
    python scripts/bench_step.py --write-counts tests/fixtures/step_counts.json
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from statistics import median
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from ceilings import Ceilings, StepWork, measure, step_work
from step_counts import recorded, write_counts
from step_profile import busy_ms, by_scope, traced

from jaxserve.core.clock import MonotonicClock
from jaxserve.core.config import (
    AttentionBackend,
    CacheConfig,
    CompilationConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    Quantization,
    SchedulerConfig,
)
from jaxserve.core.plan import PageUpdates, StepPlan
from jaxserve.core.progress import NoProgress
from jaxserve.core.request import EngineRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.launch import weight_plan
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import read_spec
from jaxserve.runner.compile import Executable, Program
from jaxserve.runner.runner import Runner
from jaxserve.runner.start import plan_memory
from jaxserve.runner.trace import Scopes, scopes_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params
from jaxserve.weights.random import random_params
from jaxserve.weights.source import locate

WARM_STEPS = 8
SHOWN_SCOPES_MAX = 12      # of each program, those that take most
COUNTED = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-llama-tied"


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, stream=sys.stderr)
    if options.write_counts is not None:
        write_counts(options.write_counts, Path(options.model))
        return
    ceilings = measure(jnp.dtype(options.dtype))
    built: dict[str, tuple[Program, Executable]] = {}
    with recorded(built):
        runner, work, seconds = start(options)
    config = EngineConfig(model=ModelConfig(model=options.model))
    report: dict[str, object] = {
        "model": Path(options.model).name, "dtype": options.dtype, "device": jax.devices()[0].device_kind,
        "start_s": seconds, "host_ms": {}, "device_ms": {},
        "ceilings": {"GB/s": round(ceilings.read_gb_s, 1), "GFLOP/s": round(ceilings.dot_gflop_s)},
    }
    for rows in options.rows:
        times = host_times(runner, config, rows, options)
        times["rate"] = decode_rate(work, ceilings, rows, options.context, times["step"]["median"])
        report["host_ms"][rows] = times    # type: ignore[index]
        _so_far(report, options)
    plans = {
        size: prefill_plan(runner, size) for size in runner.buckets.tokens if size <= runner.shape.length_max
    }
    for tokens, plan in plans.items():
        chunk = prefill_ms(runner, plan, options.repeats)
        report["device_ms"][tokens] = chunk | prefill_rate(work, ceilings, tokens, chunk["median"])   # type: ignore
    if options.profile is not None:     # last: a tracer may slow down what comes after it, or take the process with it
        _so_far(report, options)
        report |= profiles(runner, config, options, plans, scopes_of(executable for _, executable in built.values()))
    stats = runner.stats
    report["compiled_after_ready"] = stats.compiled_after_ready_count
    runner.close()
    if options.json_line:
        print(json.dumps(report))
    else:
        print(json.dumps(report, indent=1) if options.json else _table(report))


def _so_far(report: dict[str, object], options: argparse.Namespace) -> None:
    """For programs, which take the last line: what there is where the rest fails or takes too long."""
    if options.json_line:
        print(json.dumps(report), flush=True)


def start(options: argparse.Namespace) -> tuple[Runner, StepWork, dict[str, float]]:
    """A runner with every bucket compiled, what a step of its model must do, and what the start took."""
    folder, mesh = locate(options.model), make_mesh(jax.devices())
    spec, dtype = read_spec(folder), jnp.dtype(options.dtype)
    rows_max = max(options.rows)
    config = EngineConfig(
        model=ModelConfig(model=str(folder), quantization=options.quantization),
        load=LoadConfig(load_format=options.load_format),
        scheduler=SchedulerConfig(max_num_seqs=rows_max, max_num_batched_tokens=options.tokens_max),
        cache=CacheConfig(kv_cache_memory_bytes=options.kv_cache_memory_bytes),
        compilation=CompilationConfig(
            compilation_cache_dir=options.compilation_cache_dir, attention_backend=options.attention_backend
        ),
    )
    weights = weight_plan(config, spec, folder, mesh)
    began = time.perf_counter()
    setup = plan_memory(
        spec=spec, params=abstract_params(spec, dtype, mesh, weights.packing), mesh=mesh, dtype=dtype,
        config=config,
    )
    planned = time.perf_counter()
    if options.load_format == "dummy":
        params = random_params(spec, mesh, dtype, packing=weights.packing)
    else:
        params = load_params(spec, folder, mesh, dtype, packing=weights.packing, scheme=weights.scheme)
    loaded = time.perf_counter()
    runner = Runner.create(setup=setup, params=params)
    runner.compile_serving_set(NoProgress())
    serving = time.perf_counter()
    runner.compile_rest(NoProgress())
    runner.wait_ready()
    ready = time.perf_counter()
    stats = runner.compile_stats
    return runner, step_work(spec, params, dtype.itemsize), {
        "plan": planned - began, "load": loaded - planned, "serving": serving - loaded, "ready": ready - loaded,
        "lower": stats.lower_s, "compile": stats.compile_s, "read": stats.load_s,
        "programs": stats.compiled_count + stats.loaded_count, "compiled": stats.compiled_count,
    }


def host_times(
    runner: Runner, config: EngineConfig, rows: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Milliseconds of a decode step with `rows` sequences of about `--context` tokens."""
    count = WARM_STEPS + options.steps
    loop = decoding(runner, config, rows, options)
    samples: dict[str, list[float]] = {}
    for step in range(count):
        began = time.perf_counter()
        loop.step()
        whole, timing, launch = time.perf_counter() - began, loop.last_timing, runner.last_launch
        if step < WARM_STEPS:
            continue
        spent = {
            "plan": timing.plan_s, "check": launch.check_s, "pack": launch.pack_s, "dispatch": launch.dispatch_s,
            "commit": timing.commit_s, "wait": timing.wait_s, "step": whole,
        }
        spent["host"] = whole - timing.wait_s
        for name, seconds in spent.items():
            samples.setdefault(name, []).append(seconds * 1e3)
    end(loop, rows)
    return {name: summary(values) for name, values in samples.items()}


def profiles(
    runner: Runner, config: EngineConfig, options: argparse.Namespace, plans: dict[int, StepPlan], scopes: Scopes
) -> dict[str, dict[str, object]]:
    """Milliseconds of the same steps by program and scope, and of decodes in which the device was busy at all.

    Their traces lie in a folder each. A device that cannot be traced is said, and costs nothing but that.
    """
    found: dict[str, dict[str, object]] = {"profile_ms": {}, "busy_ms": {}}
    for rows in (count for count in options.rows if count <= options.profile_rows_max):
        loop = decoding(runner, config, rows, options)
        for _ in range(WARM_STEPS):
            loop.step()
        try:
            operations = traced(loop.step, options.steps, options.profile / f"rows{rows}", scopes)
        except (RuntimeError, OSError, ValueError) as error:
            found["busy_ms"][str(rows)] = f"no trace: {error}"
        else:
            found["profile_ms"][f"{rows} rows"] = by_scope(operations, options.steps)
            found["busy_ms"][str(rows)] = busy_ms(operations, options.steps) or "no trace: it has no kernel"
        end(loop, rows)
    for tokens, plan in plans.items():
        try:
            operations = traced(
                lambda plan=plan: runner.launch(plan).result(), options.repeats,     # type: ignore[misc]
                options.profile / f"prefill{tokens}", scopes,
            )
        except (RuntimeError, OSError, ValueError):
            continue
        found["profile_ms"][f"prefill {tokens}"] = by_scope(operations, options.repeats)
    return found


def decoding(runner: Runner, config: EngineConfig, rows: int, options: argparse.Namespace) -> EngineLoop:
    """A loop all of whose `rows` sequences decode, for WARM_STEPS and `--steps` at least."""
    loop = EngineLoop(runner, config=config.scheduler, cache=config.cache, clock=MonotonicClock())
    rng = np.random.default_rng(0)
    count = WARM_STEPS + options.steps
    for index in range(rows):
        prompt = rng.integers(0, runner.shape.vocab_size, options.context).tolist()
        loop.add(EngineRequest(
            request_id=str(index), prompt_token_ids=tuple(prompt),
            params=SamplingParams(temperature=options.temperature, max_tokens=count + rows * 4, ignore_eos=True),
        ))
    while loop.stats.generation_tokens < rows * 2:
        loop.step()
    return loop


def end(loop: EngineLoop, rows: int) -> None:
    """Leaves nothing of `decoding` behind."""
    loop.abort([str(index) for index in range(rows)])
    while loop.has_work:
        loop.step()
    loop.flush_prefix_cache()


def summary(values: list[float]) -> dict[str, float]:
    """The median, and the minimum: what remains on a machine that others use too."""
    return {"median": round(median(values), 3), "min": round(min(values), 3)}


def prefill_plan(runner: Runner, tokens: int) -> StepPlan:
    """A step that prefills one chunk of `tokens`, sampling nothing."""
    shape = runner.shape
    pages = -(-tokens // shape.page_size)
    index_U = np.arange(pages, dtype=np.int32)
    zero_T, false_A = np.zeros(tokens, np.int32), np.zeros(1, bool)
    return StepPlan(
        step=0, row_A=np.zeros(1, np.int32), start_A=np.zeros(1, np.int32), count_A=np.array([tokens], np.int32),
        from_row_A=false_A, samples_A=false_A, scores_A=false_A, token_T=zero_T, score_target_T=zero_T - 1,
        decode_count=0,
        page_updates=tuple(
            PageUpdates(row_U=np.zeros(pages, np.int32), index_U=index_U, page_U=index_U) for _ in shape.groups
        ),
    )


def prefill_ms(runner: Runner, plan: StepPlan, repeats: int) -> dict[str, float]:
    """Milliseconds of the step."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        runner.launch(plan).result()
        times.append((time.perf_counter() - began) * 1e3)
    return summary(times[1:])


def decode_rate(work: StepWork, ceilings: Ceilings, rows: int, context: int, ms: float) -> dict[str, float]:
    """What a decode step reads and computes a second, and its share of the ceilings."""
    return _rate(work.decode_gb_s(rows, context, ms), work.decode_gflop_s(rows, ms), ceilings)


def prefill_rate(work: StepWork, ceilings: Ceilings, tokens: int, ms: float) -> dict[str, float]:
    """The same of a chunk from which nothing is sampled."""
    return _rate(work.prefill_gb_s(ms), work.prefill_gflop_s(tokens, ms), ceilings)


def _rate(gb_s: float, gflop_s: float, ceilings: Ceilings) -> dict[str, float]:
    return {
        "GB/s": round(gb_s, 1), "of_read": round(gb_s / ceilings.read_gb_s, 2),
        "GFLOP/s": round(gflop_s), "of_dot": round(gflop_s / ceilings.dot_gflop_s, 2),
    }


def _table(report: dict[str, object]) -> str:
    lines = [f"{report['model']} {report['dtype']} on {report['device']}"]
    lines.append("start, seconds: " + "  ".join(f"{k} {v:.2f}" for k, v in report["start_s"].items()))   # type: ignore
    lines.append("ceilings, measured now: " + "  ".join(f"{v} {k}" for k, v in report["ceilings"].items()))   # type: ignore
    lines.append("milliseconds, median (minimum):")
    for rows, times in report["host_ms"].items():                                                        # type: ignore
        rate = times.pop("rate")
        spent = "  ".join(f"{name} {ms['median']:.2f} ({ms['min']:.2f})" for name, ms in times.items())
        lines.append(f"{rows:4} rows: {spent}  {_share(rate)}")
    for step, programs in report.get("profile_ms", {}).items():                                          # type: ignore
        for program, scopes in programs.items():
            lines.append(f"{step}, {program}: {sum(scopes.values()):.2f}")
            lines += [f"{ms:14.3f} {scope}" for scope, ms in list(scopes.items())[:SHOWN_SCOPES_MAX]]
    for tokens, ms in report["device_ms"].items():                                                       # type: ignore
        speed = f"{tokens / ms['median'] * 1e3:.0f} tokens/s"
        lines.append(f"prefill of {tokens:5} tokens: {ms['median']:9.2f} ({ms['min']:.2f}), {speed}  {_share(ms)}")
    lines.append(f"compiled after ready: {report['compiled_after_ready']}")
    return "\n".join(lines)


def _share(rate: dict[str, float]) -> str:
    return f"{rate['GB/s']} GB/s ({rate['of_read']:.0%})  {rate['GFLOP/s']} GFLOP/s ({rate['of_dot']:.0%})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(COUNTED), help="folder or GGUF file; default: a tiny checkpoint")
    parser.add_argument(
        "--write-counts", type=Path, metavar="FILE",
        help="time nothing; record dispatches, transfers, leaves, instructions and copies, see step_counts.py",
    )
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=get_args(Quantization), default=None)
    parser.add_argument("--attention-backend", choices=get_args(AttentionBackend), default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="of each prefill")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens-max", type=int, default=None, help="--max-num-batched-tokens")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=None)
    parser.add_argument("--compilation-cache-dir", default=None)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="trace steps, named as in the source")
    parser.add_argument("--profile-rows-max", type=int, default=1 << 20, metavar="N", help="traces no larger decodes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--json-line", action="store_true", help="the same in one line, for programs")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
