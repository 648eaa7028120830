"""Everything that only a GPU can say of the kernels and of whole steps, in one command: `make kernels-gpu`.

    make kernels-gpu                                     # the interpreter that PYTHON names; installs nothing
    PYTHONPATH=. python scripts/kernels_gpu.py --list    # the parts; needs no GPU
    PYTHONPATH=. python scripts/kernels_gpu.py --only numerics speed --output found

Results at real shapes beside the float32 reference with poisoned pages, batch invariance, decode's bandwidth beside a
copy and prefill's speed beside a matrix product of the same run, other people's kernels; products of packed weights and
of 8 bits beside the same product in bfloat16; whole steps of two models on dummy weights, and how long the host leaves
the device idle between them; whole lives of the engine (cold and warm starts, tokens a second, memory), beside
transformers where torch is. Each part runs in a process of its own with a time limit; one that fails is a line in the
tables. Writes OUTPUT.json and OUTPUT.md, the tables ready for docs/kernels.md. Needs no network and no server package.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kernels_pallas.eight_bit_matmul import cases as eight_bit_matmul_cases
from kernels_pallas.quantized import FP8
from kernels_pallas.quantized_matmul import cases as quantized_matmul_cases
from scripts.device_timing import in_process
from scripts.published_models import MODELS, SMALL

ROOT = Path(__file__).parents[1]
OURS = ("mosaic_gpu", "triton", "xla")
OTHERS = ("cudnn", "jax paged_attention", "torch sdpa", "torch flex")
KINDS = (
    "ceilings", "numerics", "invariance", "speed", "product_numerics", "product_speed", "step", "gap", "life",
)
PRODUCTS = {"quantized_matmul": ("mosaic_gpu", "triton", "xla"), "eight_bit_matmul": ("mosaic_gpu", "xla")}
GEOMETRIES = (
    "smollm2-135m", "qwen2.5-3b", "llama-3.1-8b", "gemma-2-9b-local", "gpt-oss-20b-local", "deepseek-v2-lite",
)
DECODE_SIZES = ((1, 2048), (16, 2048), (64, 2048))
PREFILL_SIZES = ((1024, 0), (8192, 0), (512, 7680))
ROWS = (1, 16, 64, 256)
CHOICES = "--xla_gpu_per_fusion_autotune_cache_dir"
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="     # none of its kinds: every kernel is launched by itself
TIMEOUT_S = {"step": 1500.0, "gap": 900.0, "life": 900.0}
# Shares of the same run's ceilings that are aimed at: op, codes -> share, ceiling.
TARGETS = {
    ("paged_decode", None): (0.85, "gb_s", "copy_gb_s"), ("paged_decode", FP8): (0.75, "gb_s", "copy_gb_s"),
    ("paged_prefill", None): (0.60, "tflop_s", "matmul_tflop_s"),
}
LIVES = {"SmolLM2-135M": "smollm2-135m.yaml", "Qwen2.5-3B": "qwen3b.yaml"}     # model -> shipped configuration
STARTS = ("cold", "measured choices kept", "programs kept")     # in this order: each finds what the one before left
TIMEOUT_ELSE_S = 240.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Attributes:
    kind: of KINDS.  name: of the part within its kind.
    given: arguments of the function in `gpu_parts`, or flags of a step.
    """

    kind: str
    name: str
    given: dict[str, Any]


def parts() -> Iterator[Part]:
    """All that is run, in order; ceilings come first."""
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
    for model in MODELS:
        for backend in OURS:
            given = {"model": model, "backend": backend, "has_buffers": True}
            yield Part(kind="gap", name=f"{model} {backend}", given=given)
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
    """What runs a part, and what its environment has besides ours."""
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    if part.kind == "life":
        return _life(part, folder, own)
    own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if part.kind not in ("step", "gap"):
        return [str(Path(__file__)), "--part", json.dumps(dataclasses.asdict(part))], own
    model = _model(part.given["model"], folder)
    if not part.given["has_buffers"]:
        own["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_COMMAND_BUFFERS}".strip()
    words = [
        str(ROOT / "scripts" / "bench_step.py"), "--model", str(model), "--load-format", "dummy", "--json-line",
        "--rows", *map(str, ROWS), "--context", "1024", "--tokens-max", "8192",
        "--attention-backend", part.given["backend"], "--compilation-cache-dir", str(folder / f"programs {part.name}"),
    ]
    return (words, own) if part.kind == "step" else ([*words, "--profile", str(folder / f"trace {part.name}")], own)


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
    own["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CHOICES}={choices.resolve()}".strip()
    return [
        str(ROOT / "scripts" / "gpu_life.py"), "--model", str(model), "--config", LIVES[name], "--load-format", "dummy",
        "--compilation-cache-dir", str(programs),
    ], own


def report(found: list[tuple[Part, dict[str, Any]]]) -> str:
    """Markdown: what ran where, then a table a kind."""
    ceilings = next((result for part, result in found if part.kind == "ceilings" and "error" not in result), {})
    lines = ["; ".join(f"{name} {_figure(value)}" for name, value in ceilings.items()) or "no ceilings", ""]
    lines += _table("results", ("error", "finite"), _of(found, "numerics"))
    lines += _table("batch invariance", ("same_bits", "difference"), _of(found, "invariance"))
    speeds = []
    for part, result in _of(found, "speed"):
        shares = {}
        if "error" not in result and ceilings:
            shares = {"target": _target(part, result, ceilings)} | {
                "of copy": f"{result['gb_s'] / ceilings['copy_gb_s']:.0%}",
                "of matmul": f"{result['tflop_s'] / ceilings['matmul_tflop_s']:.0%}",
            }
        speeds.append((part, result | shares))
    lines += _table("speed", ("ms", "gb_s", "of copy", "tflop_s", "of matmul", "target"), speeds)
    lines += _table("products: results", ("error", "finite"), _of(found, "product_numerics"))
    columns = ("ms", "gb_s", "tflop_s", "bf16 ms", "times bf16")
    lines += _table("products: speed", columns, _of(found, "product_speed"))
    steps = [(part, row) for part, result in _of(found, "step") for row in _step_rows(part, result)]
    lines += _table("step", ("rows or tokens", "ms", "host ms", "of read", "of dot"), steps)
    gaps = [(part, row) for part, result in _of(found, "gap") for row in _gap_rows(result)]
    lines += _table("device between steps", ("rows", "step ms", "device busy ms", "idle ms"), gaps)
    lives = [(part, _life_row(result)) for part, result in _of(found, "life")]
    lines += _table("life", ("serving s", "ready s", "compiled", "tokens/s by rows", "GiB used of"), lives)
    return "\n".join(lines)


def _target(part: Part, result: dict[str, Any], ceilings: dict[str, Any]) -> str:
    """Whether a part that has a target meets it: decode from 16 rows of 2k on, prefill of 8k chunks from nothing."""
    given = part.given
    aimed = TARGETS.get((given.get("op", ""), given.get("codes")))
    case = given.get("case", {})
    is_large = case.get("rows", 0) >= 16 or (case.get("chunk"), case.get("before")) == (8192, 0)
    if aimed is None or given["implementation"] != "mosaic_gpu" or not is_large:
        return ""
    share, figure, ceiling = aimed
    return f"{share:.0%}: {'met' if result[figure] >= share * ceilings[ceiling] else 'missed'}"


def _gap_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a decode step takes, how much of it the device computes in a trace of the same steps, and what is left."""
    if "error" in result:
        yield result
        return
    for rows, times in result["host_ms"].items():
        busy = sum(ms for scopes in result["profile_ms"][f"{rows} rows"].values() for ms in scopes.values())
        step = times["step"]["median"]
        yield {"rows": f"{rows} rows", "step ms": step, "device busy ms": float(busy), "idle ms": float(step - busy)}


def _life_row(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        return result
    row = {"tokens/s by rows": ", ".join(f"{rows}: {rate:.0f}" for rows, rate in result["tokens_s"].items())}
    if "serving_s" not in result:
        return row
    used = f"{result['peak_gib']:.1f} of {result['limit_gib']:.1f} (fraction {result['fraction']})"
    return row | {
        "serving s": result["serving_s"], "ready s": result["ready_s"], "GiB used of": used,
        "compiled": f"{result['compiled']} of {result['programs']}, {result['compiled_after_ready']} after ready",
    }


def _of(found: Iterable[tuple[Part, dict[str, Any]]], kind: str) -> list[tuple[Part, dict[str, Any]]]:
    return [(part, result) for part, result in found if part.kind == kind]


def _step_rows(part: Part, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Decodes by rows, chunks by tokens. Host ms: of a decode step in which the device was not waited for."""
    if "error" in result:
        yield result
        return
    for rows, times in result["host_ms"].items():
        rate = times["rate"]
        yield {
            "rows or tokens": f"{rows} rows", "ms": times["step"]["median"], "host ms": times["host"]["median"],
            "of read": f"{rate['of_read']:.0%}", "of dot": f"{rate['of_dot']:.0%}",
        }
    for tokens, times in result["device_ms"].items():
        yield {
            "rows or tokens": f"{tokens} tokens", "ms": times["median"], "host ms": "",
            "of read": f"{times['of_read']:.0%}", "of dot": f"{times['of_dot']:.0%}",
        }


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[Part, dict[str, Any]]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {title} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for part, result in rows:
        failed = isinstance(result.get("error"), str)
        cells = [_figure(result.get(column, "")) for column in columns]
        if failed:
            cells = [f"not run: {_one_line(result['error'])}", *[""] * (len(columns) - 1)]
        lines.append(f"| {part.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _one_line(text: str) -> str:
    return text.strip().splitlines()[-1].replace("|", "/")[:200] if text.strip() else "no reason given"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    options = _options()
    if options.part is not None:
        from scripts.gpu_parts import PARTS, baseline  # late: a list of parts needs no jax

        given = json.loads(options.part)
        is_other = given["given"].get("implementation") in OTHERS
        run = baseline if is_other else PARTS[given["kind"]]
        print(json.dumps(run(**given["given"])))
        return 0
    todo = [part for part in parts() if part.kind in options.only and options.match in part.name]
    if options.list:
        print("\n".join(f"{part.kind}: {part.name}" for part in todo))
        return 0
    found = []
    for part in todo:
        words, own = command(part, options.output.with_suffix(".work"))
        limit = TIMEOUT_S.get(part.kind, TIMEOUT_ELSE_S)
        result = in_process(words, timeout_s=limit, environment=os.environ | own)
        print(f"{part.kind}: {part.name}: {json.dumps(result)}", flush=True)
        found.append((part, result))
        whole = [{"part": dataclasses.asdict(one), "found": what} for one, what in found]
        options.output.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(report(found), encoding="utf-8")
    return 0 if any("error" not in result or not isinstance(result["error"], str) for _, result in found) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="kinds of parts to run")
    parser.add_argument("--match", default="", help="only parts with this in their name")
    parser.add_argument("--output", type=Path, default=Path("kernels-gpu"), help="of .json and .md, without an ending")
    parser.add_argument("--list", action="store_true", help="print the parts and run nothing")
    parser.add_argument("--part", metavar="JSON", help="run this one part here (used by the run itself)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
