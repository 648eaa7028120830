"""A run of a tuner: trials in turn in another process, with time limits; a file an op of what they gave.

Knows neither kernels nor sizes: who calls brings trials and says what a file holds of their results.
Invariant: a trial that fails is a line of the file, and never ends the run; what a run had found is in the file, too,
where it is ended early.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from kernels_pallas import hopper
from scripts.device_timing import evidence
from scripts.part_process import in_turn

ROOT = Path(__file__).parents[1]
KEPT_S = 20.0      # results are written this often
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # the trials' processes need the device's memory
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
    """Gives the trials to `script --answer` op by op and writes tuned/DEVICE/OP.json below `options.output`."""
    said, todo = evidence(), list(todo)
    until = None if options.seconds is None else time.monotonic() + options.seconds
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for op in options.op:
        file = options.output / hopper.tuned_file(said["device"], op)
        file.parent.mkdir(parents=True, exist_ok=True)
        trials = [trial for trial in todo if trial.op == op]
        given = [json.dumps(dataclasses.asdict(trial)) for trial in trials]    # type: ignore[call-overload]
        results: Results = []
        written = time.monotonic()
        found_in_turn = in_turn(
            [script, "--answer"], given, timeout_s=options.timeout, environment=environment, until=until
        )
        for trial, found in zip(trials, found_in_turn, strict=False):
            print(f"{trial.name}: {found}", flush=True)
            results.append((trial, found))
            if time.monotonic() - written > KEPT_S:
                file.write_text(json.dumps(record(results, said), indent=1) + "\n", encoding="utf-8")
                written = time.monotonic()
        if results:
            file.write_text(json.dumps(record(results, said), indent=1) + "\n", encoding="utf-8")
            print(f"written: {file}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that every tuner has."""
    parser.add_argument("--timeout", type=float, default=90.0, metavar="S", help="of one trial")
    parser.add_argument("--output", type=Path, default=ROOT / "kernels_pallas", help="folder that gets tuned/")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and measure nothing")
    parser.add_argument("--seconds", type=float, help="ends then, whatever is left")
    parser.add_argument("--answer", action="store_true", help="run trials as stdin names them (used by the run itself)")
