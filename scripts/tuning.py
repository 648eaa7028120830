"""A run of a tuner: every trial in a process of its own with a time limit, then a file an op of all that was measured.

Knows neither kernels nor sizes: who calls brings trials and says what a file holds of their results.
Invariant: a trial that fails is a line of the file, and never ends the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from kernels_pallas import hopper
from scripts.device_timing import evidence, in_process

ROOT = Path(__file__).parents[1]
Results = list[tuple[Any, dict[str, Any]]]


class TrialPort(Protocol):
    """A frozen dataclass of what is tried."""

    @property
    def op(self) -> str: ...

    @property
    def name(self) -> str: ...


def tune(
    script: str, options: argparse.Namespace, todo: Iterable[TrialPort],
    record: Callable[[Results, dict[str, str]], dict[str, Any]],
) -> None:
    """Runs the trials op by op as `script --trial JSON` and writes tuned/DEVICE/OP.json below `options.output`."""
    said, todo = evidence(), list(todo)
    for op in options.op:
        results: Results = []
        for trial in (one for one in todo if one.op == op):
            found = in_process(
                [script, "--trial", json.dumps(dataclasses.asdict(trial))],    # type: ignore[call-overload]
                timeout_s=options.timeout,
                environment=os.environ | {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            print(f"{trial.name}: {found}", flush=True)
            results.append((trial, found))
        file = options.output / hopper.tuned_file(said["device"], op)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record(results, said), indent=1) + "\n", encoding="utf-8")
        print(f"written: {file}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that every tuner has."""
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="of one trial")
    parser.add_argument("--output", type=Path, default=ROOT / "kernels_pallas", help="folder that gets tuned/")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and measure nothing")
    parser.add_argument("--trial", metavar="JSON", help="run this one trial here (used by the run itself)")
