"""The parts of `make kernels-gpu`: which there are, which come first, and what runs each.

Needs no GPU and initialises none: processes of parts must find the device free. Invariant: what is most worth knowing
comes first, so a run that is cut short has it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels_pallas.eight_bit_matmul import cases as eight_bit_matmul_cases
from kernels_pallas.quantized import FP8
from kernels_pallas.quantized_matmul import cases as quantized_matmul_cases
from scripts.published_models import MODELS, SMALL

ROOT = Path(__file__).parents[1]
OURS = ("mosaic_gpu", "triton", "xla")
OTHERS = ("cudnn", "jax paged_attention", "torch sdpa", "torch flex")
KINDS = ("ceilings", "numerics", "invariance", "speed", "product_numerics", "product_speed", "step", "life")
ALONE = ("step", "life")                            # a process each
TOGETHER = ("numerics", "product_numerics")         # several processes at once: nothing is timed
PRODUCTS = {"quantized_matmul": ("mosaic_gpu", "triton", "xla"), "eight_bit_matmul": ("mosaic_gpu", "xla")}
GEOMETRIES = (
    "smollm2-135m", "qwen2.5-3b", "llama-3.1-8b", "gemma-2-9b-local", "gpt-oss-20b-local", "deepseek-v2-lite",
)
DECODE_SIZES = ((1, 2048), (16, 2048), (64, 2048))
PREFILL_SIZES = ((1024, 0), (8192, 0), (512, 7680))
ROWS = (1, 16, 64, 256)
TOKENS_MAX = 2048      # of a step: 8,192 has four buckets more to compile
CHOICES = "--xla_gpu_per_fusion_autotune_cache_dir"
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="     # none of its kinds: every kernel is launched by itself
UNTUNED = "--xla_gpu_autotune_level=0"     # choosing by time is half of compiling
TIMEOUT_S = {"step": 400.0, "life": 400.0, "numerics": 45.0, "product_numerics": 45.0}
TIMEOUT_ELSE_S = 90.0
LEAST_S = {"step": 150.0, "life": 120.0}     # with less left none is begun
LIVES = {"SmolLM2-135M": "smollm2-135m.yaml", "Qwen2.5-3B": "qwen3b.yaml"}     # model -> shipped configuration
STARTS = ("cold", "measured choices kept", "programs kept")     # in this order: each finds what the one before left
FIRST_SHAPE, FIRST_MODEL, FIRST_LIFE = "llama-3.1-8b", "Llama-3.1-8B", "Qwen2.5-3B"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Attributes:
    kind: of KINDS.  name: of the part within its kind.
    given: arguments of the function in `gpu_parts`, or flags of a step.
    """

    kind: str
    name: str
    given: dict[str, Any]


    @property
    def by(self) -> str | None:
        """The implementation, or the backend of a step."""
        return self.given.get("implementation") or self.given.get("backend")


def parts() -> list[Part]:
    """All that is run, the most valuable first."""
    return sorted(_parts(), key=lambda part: (_turn(part), *_alike(part)))


def _alike(part: Part) -> tuple[int, int]:
    """Parts that share a process stand together."""
    everybody = (*OURS, *OTHERS)
    is_alone = part.kind in ALONE or part.by is None
    return KINDS.index(part.kind), 0 if is_alone else everybody.index(part.by)


def _turn(part: Part) -> int:
    """What comes first: Hopper's kernels and their results, one model's attention by everybody, its steps, a life."""
    kind, is_hoppers = part.kind, part.by == "mosaic_gpu"
    shape = part.given["case"]["shape"] if kind == "speed" else ""
    turns = (
        kind == "ceilings",
        kind in ("numerics", "invariance") and is_hoppers,
        kind == "product_numerics" and is_hoppers,
        shape == FIRST_SHAPE and part.by != "torch flex",
        kind == "step" and part.given["model"] == FIRST_MODEL and part.given["has_buffers"] and part.by != "triton",
        kind == "life" and part.given["model"] == FIRST_LIFE,
        kind == "product_speed" and is_hoppers,
        kind == "speed" and is_hoppers,
        kind == "step" and part.given["model"] == FIRST_MODEL,
        part.by != "torch flex",
        True,
    )
    return turns.index(True)


def _parts() -> Iterator[Part]:
    yield Part(kind="ceilings", name="ceilings", given={"size": 1 << 31, "side": 8192})
    checked = (("paged_decode", {"rows": 16, "context": 2041}), ("paged_prefill", {"chunk": 505, "before": 1536}))
    for shape in GEOMETRIES:
        for op, case in checked:
            for implementation in OURS:
                for codes in (None, "int8", FP8):
                    yield _part("numerics", op, implementation, {"shape": shape} | case, codes)
    for implementation in OURS:
        given = {"implementation": implementation, "case": {"shape": "llama-3.1-8b", "rows": 64, "context": 2048}}
        yield Part(kind="invariance", name=f"paged_decode {implementation}", given=given)
    for shape in GEOMETRIES:
        sizes = [("paged_decode", {"rows": rows, "context": context}) for rows, context in DECODE_SIZES]
        sizes += [("paged_prefill", {"chunk": chunk, "before": before}) for chunk, before in PREFILL_SIZES]
        for op, case in sizes:
            for implementation in (*OURS, *OTHERS):
                for codes in (None, FP8) if implementation == "mosaic_gpu" else (None,):
                    yield _part("speed", op, implementation, {"shape": shape} | case, codes)
    for kind in ("product_numerics", "product_speed"):
        for op, case in ((one, case) for one in PRODUCTS for case in product_cases(one)):
            for implementation in PRODUCTS[op]:
                given = {"op": op, "implementation": implementation, "case": case}
                yield Part(kind=kind, name=f"{op} {case} {implementation}", given=given)
    for model in MODELS:
        for backend in OURS:
            for has_buffers in (True, False):
                buffers = "command buffers" if has_buffers else "no command buffers"
                given = {"model": model, "backend": backend, "has_buffers": has_buffers}
                yield Part(kind="step", name=f"{model} {backend}, {buffers}", given=given)
    for model in LIVES:
        for start in STARTS:
            yield Part(kind="life", name=f"{model} {start}", given={"model": model, "start": start})
        yield Part(kind="life", name=f"{model} transformers", given={"model": model, "start": None})


def product_cases(op: str) -> list[str]:
    """Names of the cases of a product of codes."""
    cases = {"quantized_matmul": quantized_matmul_cases.CASES, "eight_bit_matmul": eight_bit_matmul_cases.CASES}[op]
    return [case.name for case in cases]


def _part(kind: str, op: str, implementation: str, case: dict[str, Any], codes: str | None) -> Part:
    size = " ".join(str(value) for name, value in case.items() if name != "changes")
    given = {"op": op, "implementation": implementation, "case": case, "codes": codes}
    return Part(kind=kind, name=f"{op} {size} {codes or 'bfloat16'} {implementation}", given=given)


def command(part: Part, folder: Path) -> tuple[list[str], dict[str, str]]:
    """What runs a part (of ALONE) or parts of its kind in turn (of the others), and what its environment has more.

    Steps and lives have the device's memory as a server has; many small parts take what they need.
    """
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", **path_to_ptxas()}
    if part.kind == "life":
        return _life(part, folder, own)
    if part.kind != "step":
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if part.kind in TOGETHER:
            own["XLA_FLAGS"] = _flags(UNTUNED)
        return [str(ROOT / "scripts" / "kernels_gpu.py"), "--answer"], own
    name = part.given["model"]
    model, choices = _model(name, folder), folder / f"choices-of-steps-{name}"
    choices.mkdir(parents=True, exist_ok=True)
    own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.9"
    own["XLA_FLAGS"] = _flags(
        f"{CHOICES}={choices.resolve()}", *(() if part.given["has_buffers"] else (NO_COMMAND_BUFFERS,))
    )
    return [
        str(ROOT / "scripts" / "bench_step.py"), "--model", str(model), "--load-format", "dummy", "--json-line",
        "--rows", *map(str, ROWS), "--context", "1024", "--tokens-max", str(TOKENS_MAX),
        "--attention-backend", part.given["backend"], "--compilation-cache-dir", str(folder / f"programs {part.name}"),
        "--profile", str(folder / f"trace {part.name}"), "--profile-rows-max", "64",
    ], own


def path_to_ptxas() -> dict[str, str]:
    """A PATH with ptxas on it, where one lies about: Mosaic asks it for its version, and looks nowhere else."""
    if shutil.which("ptxas") is not None:
        return {}
    installed = Path(sysconfig.get_path("purelib"))
    places = [
        Path("/usr/local/cuda/bin"), installed / "nvidia/cu13/bin", installed / "nvidia/cuda_nvcc/bin",
        installed / "triton/backends/nvidia/bin",
    ]
    found = next((place for place in places if (place / "ptxas").is_file()), None)
    return {} if found is None else {"PATH": f"{os.environ.get('PATH', '')}:{found}"}


def unready(part: Part, folder: Path) -> str:
    """What a warm start would find missing: the cold one was on another machine, or did not end."""
    if part.kind != "life" or part.given["start"] not in STARTS[1:]:
        return ""
    name = part.given["model"]
    kept = folder / (f"choices-{name}" if part.given["start"] == STARTS[1] else f"life-{name}")
    return "" if kept.is_dir() and any(kept.iterdir()) else "not tried: nothing is left of an earlier start"


def _flags(*flags: str) -> str:
    return " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def _model(name: str, folder: Path) -> Path:
    """A folder with the model's config.json."""
    model = folder / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps((MODELS | SMALL)[name]), encoding="utf-8")
    return model


def _life(part: Part, folder: Path, own: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """A life on dummy weights, as the shipped configuration has it; the allocator is set as a server sets it.

    A cold start finds neither programs nor the choices of kernels that XLA measured; then only the programs go.
    """
    name, start = part.given["model"], part.given["start"]
    model = _model(name, folder)
    if start is None:
        return [str(ROOT / "scripts" / "generate_hf.py"), "--model", str(model)], own
    programs, choices = folder / f"life-{name}", folder / f"choices-{name}"
    for kept in {"cold": (programs, choices), "measured choices kept": (programs,)}.get(start, ()):
        shutil.rmtree(kept, ignore_errors=True)
    choices.mkdir(parents=True, exist_ok=True)
    own["XLA_FLAGS"] = _flags(f"{CHOICES}={choices.resolve()}")
    return [
        str(ROOT / "scripts" / "gpu_life.py"), "--model", str(model), "--config", LIVES[name], "--load-format", "dummy",
        "--compilation-cache-dir", str(programs),
    ], own
