"""Everything that only a GPU can say of the kernels and of whole steps, in one command: `make kernels-gpu`.

    make kernels-gpu                                     # the interpreter that PYTHON names; installs nothing
    PYTHONPATH=. python scripts/kernels_gpu.py --list    # the parts, in their order; needs no GPU
    PYTHONPATH=. python scripts/kernels_gpu.py --only numerics speed --output found
    PYTHONPATH=. python scripts/kernels_gpu.py --seconds 560 --resume     # as far as it goes; again: goes on there

Results at real shapes beside the float32 reference with poisoned pages, batch invariance, decode's bandwidth beside a
copy and prefill's speed beside a matrix product of the same run, other people's kernels; products of packed weights and
of 8 bits beside the same product in bfloat16; whole steps of two models on dummy weights, and how long the host leaves
the device idle between them; whole lives of the engine (cold and warm starts, tokens a second, memory), beside
transformers where torch is. Steps and lives run in processes of their own, small parts in turn in one that is replaced
when a part breaks it; all have time limits, and one that fails is a line in the tables. The most valuable come first.
Writes OUTPUT.json and OUTPUT.md after every part. Needs no network and no server package.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.gpu_list import (
    ALONE,
    KINDS,
    LEAST_S,
    OTHERS,
    ROOT,
    TIMEOUT_ELSE_S,
    TIMEOUT_S,
    TOGETHER,
    Part,
    command,
    parts,
    unready,
)
from scripts.gpu_report import report
from scripts.part_process import answer, in_process, in_turn

SHOWN = 300         # characters of a result; the files have all
OVER = "the run ended"      # why a part found less than it would have: another run tries again
PROCESSES = 4       # at once, of parts that are not timed


class Run:
    """Parts that are run and what they found. Mutable; `record` may be called from any thread.

    Args:
      until: of time.monotonic, when nothing is begun and nothing goes on; None: when all is done.
    """

    def __init__(self, options: argparse.Namespace, until: float | None) -> None:
        self.found: list[tuple[Part, dict[str, Any]]] = []
        self._output, self._copy, self._until = options.output, options.copy, until
        self._folder = options.output.with_suffix(".work")
        self._lock = threading.Lock()

    def all(self, todo: list[Part]) -> None:
        """Part by part; those alike share processes."""
        for (kind, _), group in itertools.groupby(todo, key=lambda part: (part.kind, part.by)):
            alike = list(group)
            if kind in ALONE:
                for part in alike:
                    self._alone(part)
            elif kind in TOGETHER:
                with ThreadPoolExecutor(PROCESSES) as pool:
                    list(pool.map(self._in_turn, (alike[first::PROCESSES] for first in range(PROCESSES))))
            else:
                self._in_turn(alike)

    def record(self, part: Part, result: dict[str, Any]) -> None:
        with self._lock:
            print(f"{part.kind}: {part.name}: {json.dumps(result)[:SHOWN]}", flush=True)
            self._keep(part, result)
            whole = [{"part": dataclasses.asdict(one), "found": what} for one, what in self.found]
            texts = {".json": json.dumps(whole, indent=1) + "\n", ".md": _tables(self.found)}
            for ending, text in texts.items():
                _write(self._output.with_suffix(ending), text)
                if self._copy is not None:
                    shutil.copy(self._output.with_suffix(ending), self._copy)

    def measured(self, part: Part) -> dict[str, Any]:
        """What one small part finds, not recorded yet."""
        words, own = command(part, self._folder)
        environment = os.environ | own
        return next(in_turn(words, [_line(part)], timeout_s=TIMEOUT_ELSE_S, environment=environment), {})

    def is_done(self, part: Part) -> bool:
        """Whether there is a result, and all of it."""
        return any(_is_same(one, part) and result.get("cut") != OVER for one, result in self.found)

    def _keep(self, part: Part, result: dict[str, Any]) -> None:
        """In place of an earlier try's; but what that had found is not given for an error."""
        before = next((what for one, what in self.found if _is_same(one, part)), None)
        if before is None or not isinstance(result.get("error"), str) or isinstance(before.get("error"), str):
            self.found = [(one, what) for one, what in self.found if not _is_same(one, part)] + [(part, result)]

    def _alone(self, part: Part) -> None:
        left = self._left()
        if left < LEAST_S.get(part.kind, 0):
            return
        why = unready(part, self._folder) or self._hopeless(part)
        if why:
            return self.record(part, {"error": why})
        words, own = command(part, self._folder)
        limit = min(TIMEOUT_S[part.kind], left)
        result = in_process(words, timeout_s=limit, environment=os.environ | own)
        if self._left() <= 0 and "cut" in result:
            result["cut"] = OVER
        if "error" not in result or self._left() > 0:      # what our own end ended has not failed
            self.record(part, result)
        return None

    def _in_turn(self, alike: Sequence[Part]) -> None:
        todo = []
        for part in alike:
            why = self._hopeless(part)
            if why:
                self.record(part, {"error": why})
            else:
                todo.append(part)
        if not todo:
            return
        words, own = command(todo[0], self._folder)
        limit = TIMEOUT_S.get(todo[0].kind, TIMEOUT_ELSE_S)
        results = in_turn(
            words, list(map(_line, todo)), timeout_s=limit, environment=os.environ | own, until=self._until
        )
        for part, result in zip(todo, results, strict=False):
            self.record(part, result)

    def _hopeless(self, part: Part) -> str:
        """Why a part that is timed need not be tried: no result of its implementation could be had."""
        kind = {"speed": "numerics", "step": "numerics", "product_speed": "product_numerics"}.get(part.kind)
        had = [result for one, result in self.found if one.kind == kind and one.by == part.by]
        is_lost = bool(had) and all(isinstance(result.get("error"), str) for result in had)
        return f"not tried: no part of {kind} of {part.by} gave a result" if is_lost else ""

    def _left(self) -> float:
        return float("inf") if self._until is None else self._until - time.monotonic()


def _tables(found: list[tuple[Part, dict[str, Any]]]) -> str:
    """The report; what cannot be told so must not end the run."""
    try:
        return report(found)
    except Exception as error:
        return f"no tables: {type(error).__name__}: {error}\n"


def _is_same(one: Part, other: Part) -> bool:
    return (one.kind, one.name) == (other.kind, other.name)


def _line(part: Part) -> str:
    return json.dumps(dataclasses.asdict(part))


def _write(path: Path, text: str) -> None:
    """Whole or not at all: the run may be killed at any time."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _before(output: Path) -> list[tuple[Part, dict[str, Any]]]:
    """What an earlier run found."""
    path = output.with_suffix(".json")
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [(Part(**entry["part"]), entry["found"]) for entry in entries]


def _resume(run: Run, options: argparse.Namespace) -> None:
    """Takes up what was found on a device of the same name, and measures the ceilings of this one."""
    before = _before(options.output)
    (ceilings,) = (part for part in parts() if part.kind == "ceilings")
    now = run.measured(ceilings)
    earlier = next((result["device"] for part, result in before if part == ceilings and "device" in result), None)
    if None not in (earlier, now.get("device")) and earlier != now["device"]:
        aside = options.output.with_name(f"{options.output.name}-before.json")
        options.output.with_suffix(".json").replace(aside)
        print(f"this is {now['device']}; what was found on {earlier} is in {aside}")
        before = []
    run.found = [
        (part, result) for part, result in before
        if part != ceilings and not (options.retry and isinstance(result.get("error"), str))
    ]
    run.record(ceilings, now)


def _answer() -> int:
    """Runs parts here, as `in_turn` asks."""
    from scripts.gpu_parts import PARTS, baseline  # late: a list of parts needs no jax

    def run(asked: dict[str, Any]) -> dict[str, Any]:
        is_other = asked["given"].get("implementation") in OTHERS
        return (baseline if is_other else PARTS[asked["kind"]])(**asked["given"])

    return answer(run)


def main() -> int:
    options = _options()
    if options.answer:
        return _answer()
    todo = [part for part in parts() if part.kind in options.only and options.match in part.name]
    if options.list:
        print("\n".join(f"{part.kind}: {part.name}" for part in todo))
        return 0
    run = Run(options, None if options.seconds is None else time.monotonic() + options.seconds)
    if options.resume:
        _resume(run, options)
    run.all([part for part in todo if not run.is_done(part)])
    left = [part for part in todo if not run.is_done(part)]
    if left:
        print(f"{len(left)} parts are left, the first: {left[0].kind}: {left[0].name}")
    return 0 if any(not isinstance(result.get("error"), str) for _, result in run.found) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="kinds of parts to run")
    parser.add_argument("--match", default="", help="only parts with this in their name")
    parser.add_argument("--output", type=Path, default=ROOT / "kernels-gpu", help="of .json and .md, without an ending")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="another place for both files")
    parser.add_argument("--seconds", type=float, help="ends then, whatever is left")
    parser.add_argument("--resume", action="store_true", help="leave out what OUTPUT.json has of this device")
    parser.add_argument("--retry", action="store_true", help="with --resume: but not what failed")
    parser.add_argument("--list", action="store_true", help="print the parts and run nothing")
    parser.add_argument("--answer", action="store_true", help="run parts as stdin names them (used by the run itself)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
