"""Parts of a run in processes of their own: one process a part, or one that answers parts in turn.

On a GPU a process takes seconds to start, and one that met a fault of the device can do nothing more with it.
Knows neither kernels nor jax. Invariant: a part that hangs, dies or says nothing becomes an error in the report, never
the end of the run, and takes no other part with it.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

ERROR_CHARACTERS = 600      # of what a part said last
START_S = 30.0              # that a process may take before its first part
DEATHS_MAX = 3              # processes in a row that answered nothing: the next would not, either
AGAIN = 75                  # exit status: the device's state is in doubt, what is left wants a new process
FAULTS = ("JaxRuntimeError", "XlaRuntimeError", "AcceleratorError", "OutOfMemoryError")


def in_process(command: list[str], *, timeout_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a part printed as its last line, JSON; {"error": why} where it did not.

    One that ended badly after such a line has found what it says, and "cut" says how it ended.
    """
    with tempfile.TemporaryFile("w+") as out, _process(command, environment, stdin=subprocess.DEVNULL, out=out) as (
        process, said
    ):
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        why = _why(process, timeout_s) if process.returncode != 0 else ""
        text, last = _end_of(out, None), _end_of(said)
    try:
        found = json.loads(text.splitlines()[-1])
    except (IndexError, ValueError):
        found = None
    if isinstance(found, dict):
        return found | ({"cut": why} if why else {})
    return {"error": f"{why}: {last}".rstrip(": ") if why else f"printed no result: {text[-ERROR_CHARACTERS:]!r}"}


def in_turn(
    command: list[str], given: Sequence[str], *, timeout_s: float, environment: Mapping[str, str],
    until: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What `command` answers to each line of `given`, in order, as `answer` does; {"error": why} where it does not.

    Args:
      until: of time.monotonic: then all ends, and what has no answer yet gets none.
    """
    place = deaths = 0
    while place < len(given) and not _is_past(until):
        with _process(command, environment, stdin=subprocess.PIPE, out=subprocess.PIPE) as (process, said):
            assert process.stdout is not None
            answers, first, why = _answers(process.stdout), place, ""
            while place < len(given) and not why:
                limit = timeout_s + (START_S if place == first else 0)
                found = _ask(process, answers, given[place], _least(limit, until))
                if found is None:
                    if _is_past(until):
                        return
                    if _has_ended(process) and process.returncode == AGAIN and place > first:
                        break
                    why = _why(process, timeout_s)
                    deaths = deaths + 1 if place == first else 1
                    found = {"error": f"{why}: {_end_of(said)}".rstrip(": ")}
                else:
                    deaths = 0
                place += 1
                yield found
        if deaths >= DEATHS_MAX:
            yield from [{"error": f"not tried: {deaths} in a row ended so: {why}"}] * (len(given) - place)
            return


def _why(process: subprocess.Popen[str], timeout_s: float) -> str:
    return f"took longer than {timeout_s:.0f} s" if process.returncode is None else f"exit {process.returncode}"


def answer(run: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The other side of `in_turn`: runs what each line of stdin says. Returns the exit status."""
    for line in sys.stdin:
        is_broken = False
        try:
            found = run(json.loads(line))
        except Exception as error:
            is_broken = any(kind.__name__ in FAULTS for kind in type(error).__mro__)
            found = {"error": f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]}
        print(json.dumps(found), flush=True)
        if is_broken:
            return AGAIN
        gc.collect()
    return 0


@contextmanager
def _process(
    command: list[str], environment: Mapping[str, str], *, stdin: int, out: Any
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A process and a file of what it says on stderr; it and all that it started end here."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *command], stdin=stdin, stdout=out, stderr=said, text=True, env=dict(environment),
            process_group=0,
        )
        try:
            yield process, said
        finally:
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    pass
                _has_ended(process)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def _has_ended(process: subprocess.Popen[str]) -> bool:
    """Whether it ends within a moment."""
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        return False
    return True


def _answers(lines: IO[str]) -> queue.SimpleQueue[dict[str, Any] | None]:
    """Objects as they are printed, other lines left out; None at the end."""
    found: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def read() -> None:
        with lines:
            for line in lines:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue
                if isinstance(said, dict):
                    found.put(said)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def _ask(
    process: subprocess.Popen[str], answers: queue.SimpleQueue[dict[str, Any] | None], given: str, timeout_s: float
) -> dict[str, Any] | None:
    assert process.stdin is not None
    try:
        process.stdin.write(given + "\n")
        process.stdin.flush()
        return answers.get(timeout=timeout_s)
    except (BrokenPipeError, queue.Empty):
        return None


def _is_past(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _least(timeout_s: float, until: float | None) -> float:
    return timeout_s if until is None else max(0.0, min(timeout_s, until - time.monotonic()))


def _end_of(file: IO[str], characters: int | None = ERROR_CHARACTERS) -> str:
    file.seek(0)
    text = file.read().strip()
    return text if characters is None else text[-characters:]
