"""An ablation as its YAML file states it: a grid of engine switches, times workloads, times repeats.

Knows flags and loads by name and what they may be; starts nothing and measures nothing.
Invariant: what is accepted can be run as it stands, and a key that means nothing is an error with the nearest name.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_serving

from jaxserve.core.errors import ConfigError
from jaxserve.flags.build import serve_config
from jaxserve.flags.config_file import strict_loader
from jaxserve.flags.names import find

KEYS = ("about", "model", "engine", "switches", "workloads", "repeats", "warmup", "seed", "figures")
NEEDED = ("about", "switches", "workloads", "figures")
OWN_METRICS = ("prefix_hit_rate", "preemptions", "compiled_after_ready")     # read from the server's /metrics
CELLS_MAX, REPEATS_MAX = 256, 1000
DEMO = "~/.cache/jaxserve/models/SmolLM2-135M-Instruct"

# What of a load a workload may set, with the least value that makes sense.
LOAD_KEYS = {
    "num-prompts": 1, "max-concurrency": 0, "request-rate": 0, "input-len": 0, "output-len": 1, "prefix-len": 0,
    "spread": 0, "token-low": 0, "token-high": 1,
}
REAL_KEYS = ("request-rate", "spread")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One setting of all switches: a server's flags. `name` is what its tables call it."""

    name: str
    switches: tuple[tuple[str, Any], ...]
    flags: tuple[tuple[str, Any], ...]

    def words(self) -> list[str]:
        """The command line of its flags."""
        words = []
        for name, value in self.flags:
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return words


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A load by name; `settings` are flags of bench_serving.py."""

    name: str
    settings: tuple[tuple[str, Any], ...]

    def options(self) -> argparse.Namespace:
        """What `bench_serving.run_load` takes."""
        options = bench_serving.parse([])
        for name, value in self.settings:
            setattr(options, name.replace("-", "_"), value)
        return options


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """`y` over `x`: a switch, "workload", or another metric (then each cell is one point)."""

    x: str
    y: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One load on one cell, once."""

    cell: Cell
    workload: Workload
    repeat: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole ablation; the first cell is what the others are compared with."""

    name: str
    about: str
    model: str
    cells: tuple[Cell, ...]
    workloads: tuple[Workload, ...]
    repeats: int
    warmup: int                     # requests before each load
    seed: int
    figures: tuple[Figure, ...]

    def measurements(self, repeat: int, cell: Cell) -> list[Measurement]:
        """What one start of a cell's server measures; all cells get the same prompts in the same repeat."""
        return [
            Measurement(
                cell=cell, workload=workload, repeat=repeat,
                seed=self.seed + zlib.crc32(f"{workload.name} {repeat}".encode()),
            )
            for workload in self.workloads
        ]

    def rounds(self) -> Iterator[tuple[int, Cell]]:
        """Starts in order: every cell once a repeat, each repeat beginning with another one."""
        for repeat in range(self.repeats):
            turn = repeat % len(self.cells)
            for cell in self.cells[turn:] + self.cells[:turn]:
                yield repeat, cell


def read_plan(path: Path, *, model: str | None = None, repeats: int | None = None) -> Plan:
    """The plan in a file; arguments replace what the file says. Raises ConfigError."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), strict_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    content = _table(content, str(path))
    for key in content:
        _known(key, KEYS, "key")
    if missing := [key for key in NEEDED if key not in content]:
        raise ConfigError(f"{path} lacks {missing[0]!r}; needed are {', '.join(NEEDED)}")
    model = str(Path(model or content.get("model", DEMO)).expanduser())
    cells = _cells(_flags(content.get("engine", {}), "engine"), content["switches"], model)
    workloads = tuple(_workload(str(name), value) for name, value in _table(content["workloads"], "workloads").items())
    if not workloads:
        raise ConfigError("workloads is empty; name at least one load")
    return Plan(
        name=path.stem, about=str(content["about"]), model=model, cells=cells, workloads=workloads,
        repeats=_count("repeats", content.get("repeats", 3) if repeats is None else repeats, 1, REPEATS_MAX),
        warmup=_count("warmup", content.get("warmup", 4), 0, REPEATS_MAX),
        seed=_count("seed", content.get("seed", 0), 0, 2**31),
        figures=tuple(_figure(item, cells) for item in _list(content["figures"], "figures")),
    )


def metric_names() -> tuple[str, ...]:
    """Every figure that a measurement gives."""
    return (*bench_serving.figures([], 1.0), *OWN_METRICS)


def _cells(engine: Mapping[str, Any], switches: object, model: str) -> tuple[Cell, ...]:
    """The product of the switches; each is refused here if the server would refuse it."""
    choices: dict[str, list[Any]] = {}
    for key, values in _table(switches, "switches").items():
        (name,) = _flags({key: ""}, "switches")
        if name in engine or name in choices:
            raise ConfigError(f"{name} is given twice; leave it in one place")
        choices[name] = [_flags({key: value}, "switches")[name] for value in _list(values, name)]
    grid = list(itertools.product(*choices.values()))
    if len(grid) > CELLS_MAX:
        raise ConfigError(f"switches make {len(grid)} cells, at most {CELLS_MAX} may be; take some values away")
    cells = []
    for values in grid:
        chosen = dict(zip(choices, values, strict=True))
        flags = {**engine, **chosen}
        serve_config({"model": model, **flags})
        cells.append(Cell(
            name=" ".join(f"{name}={_shown(value)}" for name, value in chosen.items()) or "as configured",
            switches=tuple(chosen.items()), flags=tuple(flags.items()),
        ))
    return tuple(cells)


def _flags(content: object, where: str) -> dict[str, Any]:
    """Engine flags by their long names."""
    flags: dict[str, Any] = {}
    for key, value in _table(content, where).items():
        flag, is_off = find(str(key), where="key")
        if is_off:
            raise ConfigError(f"{where}: write {flag.name}: false instead of {key}")
        if flag.part == "frontend" or flag.name == "model":
            raise ConfigError(f"{where}: {flag.name} is no switch of the engine; take it away")
        if value is None:
            raise ConfigError(f"{where}: {flag.name} has no value; leave the line away for the default")
        if flag.name in flags:
            raise ConfigError(f"{where}: {flag.name} is given twice")
        flags[flag.name] = value
    return flags


def _workload(name: str, content: object) -> Workload:
    settings = _table(content, f"workload {name}")
    for key, value in settings.items():
        _known(key, LOAD_KEYS, f"key of workload {name}:")
        kinds = (int, float) if key in REAL_KEYS else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < LOAD_KEYS[key]:
            kind = "number" if key in REAL_KEYS else "whole number"
            raise ConfigError(f"workload {name}: {key} must be a {kind} of at least {LOAD_KEYS[key]}, got {value!r}")
    workload = Workload(name=name, settings=tuple(settings.items()))
    options = workload.options()
    low, high = options.token_low, options.token_high
    if high <= low:
        raise ConfigError(f"workload {name}: token-high {high} must be above token-low {low}")
    if not options.prefix_len and not options.input_len:
        raise ConfigError(f"workload {name}: a prompt of no tokens; raise input-len or prefix-len")
    return workload


def _figure(content: object, cells: tuple[Cell, ...]) -> Figure:
    axes = _table(content, "figure")
    for key in axes:
        _known(key, ("x", "y"), "key of a figure:")
    if set(axes) != {"x", "y"}:
        raise ConfigError(f"a figure needs x and y, got {axes!r}")
    _known(axes["y"], metric_names(), "y of a figure:")
    _known(axes["x"], ("workload", *(name for name, _ in cells[0].switches), *metric_names()), "x of a figure:")
    return Figure(x=axes["x"], y=axes["y"])


def _known(key: object, names: Any, what: str) -> None:
    if key not in names:
        near = difflib.get_close_matches(str(key), list(names), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"unknown {what} {key!r}; {hint}")


def _table(content: object, what: str) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{what} must be a table like 'key: value', got {content!r}")
    return content


def _list(content: object, what: str) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{what} must be a list of at least one value, got {content!r}")
    if len({json.dumps(item) for item in content}) < len(content):
        raise ConfigError(f"{what} has a value twice: {content!r}")
    return content


def _count(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number in [{low}, {high}], got {value!r}")
    return value


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
