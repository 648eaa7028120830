"""What a step costs in counts, which no busy machine changes: programs, dispatches, transfers, leaves, HLO, copies.

Compiles a small model anew and turns the engine's loop over it. `bench_step.py --write-counts FILE` records the counts
under the version of jax, and tests/device/test_step_counts.py compares.
Knows no time. Invariant: what is counted is what ran: dispatches are calls of compiled programs, transfers are numpy
arguments of those calls, which go to the device one by one, and explicit puts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.clock import MonotonicClock
from jaxserve.core.config import CacheConfig, CompilationConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.core.progress import NoProgress
from jaxserve.core.request import EngineRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import read_spec
from jaxserve.runner.compile import Compiler, Executable, Program
from jaxserve.runner.runner import Runner
from jaxserve.runner.start import plan_memory
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params

ROWS, TOKENS, PROMPT = 4, 16, 8
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", re.MULTILINE)

# How far a count may lie above its record: XLA's CPU backend splits loops by cores and vector width, so what it makes
# of the same program differs between machines. Programs, leaves, dispatches and transfers must be equal.
SLACK = {"instructions": 1.25, "bytes": 1.25, "copies": 1.25}
COPIES_MORE = 2     # of few copies a quarter is nothing


def counts_of(folder: Path) -> dict[str, Any]:
    """Counts of the model in `folder`, in float32."""
    built: dict[str, tuple[Program, Executable]] = {}
    with TemporaryDirectory() as store, recorded(built):
        runner = _runner(folder, Path(store))
    programs = {name: _program_counts(*pair) for name, pair in sorted(built.items())}
    steps = _step_counts(runner)
    runner.close()
    return {"program_count": len(programs), "programs": programs, "steps": steps}


def write_counts(path: Path, folder: Path) -> None:
    """Replaces the counts of this version of jax in `path`; those of others stay."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recorded[jax.__version__] = counts_of(folder)
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def differences(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """One sentence a count that is not as recorded."""
    said = []
    for part in ("programs", "steps"):
        for name in sorted(found[part].keys() | recorded[part].keys()):
            now, then = found[part].get(name), recorded[part].get(name)
            if now is None or then is None:
                said.append(f"{name} is {'gone' if now is None else 'new'}")
                continue
            for what, count in now.items():
                allowed = then[what] * SLACK.get(what, 1) + (COPIES_MORE if what == "copies" else 0)
                if count > allowed or (what not in SLACK and count != then[what]):
                    said.append(f"{name}: {what} {count}, recorded {then[what]}")
    return said


def _runner(folder: Path, store: Path) -> Runner:
    mesh, dtype = make_mesh(jax.devices()[:1]), jnp.dtype(jnp.float32)
    spec = read_spec(folder)
    config = EngineConfig(
        model=ModelConfig(model=str(folder), max_model_len=64),
        cache=CacheConfig(kv_cache_memory_bytes=2**20),
        scheduler=SchedulerConfig(max_num_seqs=ROWS, max_num_batched_tokens=TOKENS),
        compilation=CompilationConfig(compilation_cache_dir=str(store)),
    )
    setup = plan_memory(spec=spec, params=abstract_params(spec, dtype, mesh), mesh=mesh, dtype=dtype, config=config)
    runner = Runner.create(setup=setup, params=load_params(spec, folder, mesh, dtype))
    runner.compile_serving_set(NoProgress())
    runner.compile_rest(NoProgress())
    runner.wait_ready()
    return runner


def _program_counts(program: Program, executable: Executable) -> dict[str, int]:
    opcodes = Counter(INSTRUCTION.findall(executable.as_text() or ""))
    cost = executable.cost_analysis() or {}
    return {
        "leaves": len(jax.tree.leaves(program.arguments)),
        "instructions": opcodes.total(),
        "copies": sum(count for opcode, count in opcodes.items() if opcode in ("copy", "copy-start")),
        "bytes": int(cost.get("bytes accessed", 0)),
    }


def _step_counts(runner: Runner) -> dict[str, dict[str, int]]:
    """Counts of a step that admits and prefills, and of decodes of one row and of all."""
    loop = EngineLoop(runner, config=SchedulerConfig(max_num_seqs=ROWS), cache=CacheConfig(), clock=MonotonicClock())
    steps = {}

    def enter(index: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        prompt = tuple(range(index + 1, index + 1 + PROMPT))
        loop.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))

    enter(0)
    steps["first step of a prompt"] = _counted(loop)
    steps["decode of 1 row"] = _settled(loop)
    for index in range(1, ROWS):
        enter(index)
    loop.step()
    loop.step()
    steps[f"decode of {ROWS} rows"] = _settled(loop)
    loop.abort([str(index) for index in range(ROWS)])
    while loop.has_work:
        loop.step()
    return steps


def _settled(loop: EngineLoop) -> dict[str, int]:
    """Most decode steps are alike; those that take a new page may cost more, so the least of a few counts."""
    return min((_counted(loop) for _ in range(4)), key=lambda counts: sorted(counts.items()))


def _counted(loop: EngineLoop) -> dict[str, int]:
    """Dispatches, and transfers to the device, of one turn."""
    counts = {"dispatches": 0, "transfers": 0}
    call, put = jax.stages.Compiled.__call__, jax.device_put

    def counted_call(self: Executable, *arguments: Any, **named: Any) -> Any:
        counts["dispatches"] += 1
        leaves = jax.tree.leaves((arguments, named))
        counts["transfers"] += sum(not isinstance(leaf, jax.Array) for leaf in leaves)
        return call(self, *arguments, **named)

    def counted_put(x: Any, *arguments: Any, **named: Any) -> Any:
        counts["transfers"] += sum(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x))
        return put(x, *arguments, **named)

    with patch.object(jax.stages.Compiled, "__call__", counted_call), patch.object(jax, "device_put", counted_put):
        loop.step()
    return counts


@contextmanager
def recorded(built: dict[str, tuple[Program, Executable]]) -> Iterator[None]:
    """Notes what is compiled meanwhile, by name."""
    build = Compiler.build

    def noting(self: Compiler, program: Program) -> Executable:
        executable = build(self, program)
        built[program.name] = (program, executable)
        return executable

    with patch.object(Compiler, "build", noting):
        yield
