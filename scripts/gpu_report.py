"""Tables of `make kernels-gpu`, ready for docs/kernels.md: what ran where, then a table a kind.

Knows figures and their names, runs nothing. Invariant: a part without figures is a line that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kernels_pallas.quantized import FP8
from scripts.gpu_list import Part

# Shares of the same run's ceilings that are aimed at: op, codes -> share, ceiling.
TARGETS = {
    ("paged_decode", None): (0.85, "gb_s", "copy_gb_s"), ("paged_decode", FP8): (0.75, "gb_s", "copy_gb_s"),
    ("paged_prefill", None): (0.60, "tflop_s", "matmul_tflop_s"),
}


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
    gaps = [(part, row) for part, result in _of(found, "step") if "error" not in result for row in _gap_rows(result)]
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
    """What a decode step takes, how much of it the device is busy in a trace of the same steps, and what is left."""
    for rows, busy in result.get("busy_ms", {}).items():
        if isinstance(busy, str):
            yield {"error": f"{rows} rows: {busy}"}
            continue
        step = result["host_ms"][rows]["step"]["median"]
        yield {"rows": f"{rows} rows", "step ms": step, "device busy ms": busy, "idle ms": float(step - busy)}


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
