"""What an ablation found: medians with their spread, ratios to the first cell, as Markdown and as figures.

Knows measured rows, no server. Invariant: a ratio compares two measurements of the same repeat and the same prompts,
and a number stands here with how many measurements it comes from.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_plan import Cell, Figure, Plan, Workload

SHOWN = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")

Found = dict[tuple[str, str, int], dict[str, Any]]     # rows of results.jsonl by names of cell and workload, and repeat


def write_report(folder: Path, plan: Plan, found: Found) -> list[Path]:
    """Writes summary.md and one picture a figure; returns what it wrote."""
    pictures = [_draw(folder / f"{plan.name}-{number}.png", plan, figure, found)
                for number, figure in enumerate(plan.figures, 1)]
    summary = folder / "summary.md"
    summary.write_text(_summary(plan, found, pictures), encoding="utf-8")
    return [summary, *pictures]


def samples(plan: Plan, found: Found, cell: Cell, workload: Workload, metric: str) -> dict[int, float]:
    """A metric by repeat, as far as it was measured."""
    return {
        repeat: found[cell.name, workload.name, repeat]["figures"][metric]
        for repeat in range(plan.repeats) if "figures" in found.get((cell.name, workload.name, repeat), {})
    }


def _summary(plan: Plan, found: Found, pictures: Sequence[Path]) -> str:
    count = len(plan.cells) * len(plan.workloads) * plan.repeats
    rows = [row for row in found.values() if "figures" in row]
    row = rows[0] if rows else {}
    loads = [row["load_average"] for row in rows] or [0.0]
    lines = [
        f"# {plan.name}", "", plan.about, "",
        f"Model `{Path(plan.model).name}`; {row.get('machine', 'nothing measured yet')}; "
        f"{', '.join(f'{k} {v}' for k, v in row.get('versions', {}).items())}.",
        f"Load average before a measurement: {min(loads):.1f}–{max(loads):.1f}.", "",
        f"{len(rows)} of {count} measurements. Median (least to greatest) over the repeats; the ratio is the median "
        "over repeats of cell / first cell, whose servers ran in turn.",
    ]
    metrics = list(dict.fromkeys((*SHOWN, *(f.y for f in plan.figures))))
    for workload in plan.workloads:
        settings = ", ".join(f"{name} {value}" for name, value in workload.settings)
        lines += ["", f"## {workload.name}", "", settings, "", f"| cell | n | {' | '.join(metrics)} |",
                  "|---|---|" + "---|" * len(metrics)]
        for cell in plan.cells:
            columns = [_entry(plan, found, cell, workload, metric) for metric in metrics]
            n = len(samples(plan, found, cell, workload, metrics[0]))
            lines.append(f"| {cell.name} | {n} | {' | '.join(columns)} |")
    errors = [(key, row["error"]) for key, row in found.items() if "error" in row]
    if errors:
        lines += ["", "## Failed", ""]
        lines += [f"- {cell}, {load}, repeat {repeat}: {error}" for (cell, load, repeat), error in errors]
    lines += ["", *(f"![{path.stem}]({path.name})" for path in pictures), ""]
    return "\n".join(lines)


def _entry(plan: Plan, found: Found, cell: Cell, workload: Workload, metric: str) -> str:
    """`12.3 (11.9–13.0) ×1.02`."""
    own = samples(plan, found, cell, workload, metric)
    if not own:
        return "–"
    text = f"{statistics.median(own.values()):.4g} ({min(own.values()):.4g}–{max(own.values()):.4g})"
    base = samples(plan, found, plan.cells[0], workload, metric)
    ratios = [own[repeat] / base[repeat] for repeat in own if base.get(repeat)]
    return text + (f" ×{statistics.median(ratios):.2f}" if ratios and cell is not plan.cells[0] else "")


def _draw(path: Path, plan: Plan, figure: Figure, found: Found) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    switches = [name for name, _ in plan.cells[0].switches]
    if figure.x not in (*switches, "workload"):
        for workload in plan.workloads:
            _scatter(axes, plan, figure, found, workload)
    else:
        _lines(axes, plan, figure, found)
    axes.set(xlabel=figure.x.replace("_", " "), ylabel=figure.y.replace("_", " "))
    if figure.x in (*switches, "workload"):
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    canvas.savefig(path, dpi=130)
    pyplot.close(canvas)
    return path


def _series(plan: Plan, figure: Figure) -> dict[str, list[tuple[str, Cell, Workload]]]:
    """Points of each line: where x is not, the other switches and the workload name the line."""
    series: dict[str, list[tuple[str, Cell, Workload]]] = {}
    for cell in plan.cells:
        for workload in plan.workloads:
            place = {**dict(cell.switches), "workload": workload.name}
            at = str(place.pop(figure.x))
            if len(plan.workloads) == 1:
                place.pop("workload", None)
            label = " ".join(str(v) if k == "workload" else f"{k}={v}" for k, v in place.items())
            series.setdefault(label, []).append((at, cell, workload))
    return series


def _lines(axes: Any, plan: Plan, figure: Figure, found: Found) -> None:
    """Medians with their spread, side by side; joined only where x is a number."""
    series = _series(plan, figure)
    places = list(dict.fromkeys(at for points in series.values() for at, *_ in points))
    style = "-" if all(at.replace(".", "", 1).isdigit() for at in places) else ""
    for number, (label, points) in enumerate(series.items()):
        aside = (number - (len(series) - 1) / 2) * 0.06
        xs, middles, below, above = [], [], [], []
        for at, cell, workload in points:
            values = list(samples(plan, found, cell, workload, figure.y).values())
            if values:
                middle = statistics.median(values)
                xs.append(places.index(at) + aside)
                middles.append(middle)
                below.append(middle - min(values))
                above.append(max(values) - middle)
        if xs:
            axes.errorbar(xs, middles, yerr=(below, above), marker="o", capsize=3, linestyle=style, label=label or None)
    axes.set_xticks(range(len(places)), places)


def _scatter(axes: Any, plan: Plan, figure: Figure, found: Found, workload: Workload) -> None:
    """One point a cell: what one metric costs in the other."""
    xs, ys = [], []
    for cell in plan.cells:
        x = samples(plan, found, cell, workload, figure.x)
        y = samples(plan, found, cell, workload, figure.y)
        if x and y:
            xs.append(statistics.median(x.values()))
            ys.append(statistics.median(y.values()))
            axes.annotate(cell.name, (xs[-1], ys[-1]), textcoords="offset points", xytext=(5, 4), fontsize="x-small")
    if xs:
        axes.plot(xs, ys, marker="o", label=workload.name)
        axes.margins(0.2)       # room for the cells' names
