"""When each program is built: the serving set first, in the caller's time, the rest in background threads.

Knows names and order of programs, not what they compute. *Serving* is: one bucket of each kind is there. *Ready* is:
all are, and from then on a compilation anywhere in the process is counted as a fault.
Invariant: the bucket tuples only grow, and a bucket is listed only once all its programs are there. A forward without
prefill is no condition of that: until it is there, the bucket's other one serves the same steps.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from jaxserve.core.errors import EngineError
from jaxserve.core.progress import NoProgress, ProgressPort
from jaxserve.runner.compile import Compiler, Executable, Program
from jaxserve.runner.draft_model import DraftModel
from jaxserve.runner.host_memory import give_back
from jaxserve.runner.programs import ProgramSet
from jaxserve.runner.segments import StepForward
from jaxserve.runner.setup import RunnerSetup

logger = logging.getLogger("jaxserve.compile")

THREADS_MAX = 8     # programs compiled at once: each takes gigabytes of host memory for a large model

Job = tuple[dict[int, Executable], int, Program]     # where the executable goes, under which key


class ProgramBuilder:
    """The executables of one runner. Mutable: they appear one by one, from several threads."""

    def __init__(self, setup: RunnerSetup, programs: ProgramSet, draft: DraftModel | None = None) -> None:
        self._setup, self._programs, self._draft = setup, programs, draft
        self.compiler = Compiler(setup.store, setup.devices)
        self.forward: dict[int, StepForward] = {}
        self.decode_forward: dict[int, StepForward] = {}     # for steps of decodes only
        self._forward_parts: dict[int, dict[int, Executable]] = {}      # by T bucket, in the order of the programs
        self._decode_parts: dict[int, dict[int, Executable]] = {}       # the same of the layers without prefill
        self.score: dict[int, Executable] = {}
        self.sample: dict[int, Executable] = {}
        self.clear: dict[int, Executable] = {}       # by KV group
        self._single: dict[int, Executable] = {}
        self.token_buckets: tuple[int, ...] = ()
        self.row_buckets: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._done = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def reset(self) -> Executable:
        return self._single[0]

    @property
    def admit(self) -> Executable:
        return self._single[1]

    @property
    def admit_slot(self) -> Executable:
        return self._single[2]

    @property
    def is_ready(self) -> bool:
        return self._done.is_set() and self._failure is None

    def executables(self) -> list[Executable]:
        """Every program so far."""
        with self._lock:
            parts = self._parts()
            places = [self.score, self.sample, self.clear, self._single]
            if self._draft is not None:
                places += [self._draft.follow, self._draft.write, self._draft.single]
            return [*parts, *(executable for place in places for executable in place.values())]

    @property
    def temporary_bytes(self) -> int:
        """The most scratch memory that any program so far takes while it runs."""
        with self._lock:
            built = [*self._parts(), *self.sample.values(), *self.score.values()]
            if self._draft is not None:
                built += [*self._draft.follow.values(), *self._draft.write.values()]
        return max((temporary_bytes(executable) for executable in built), default=0)

    def _parts(self) -> list[Executable]:
        """What forwards are made of."""
        buckets = (*self._forward_parts.values(), *self._decode_parts.values())
        return [part for of_bucket in buckets for part in of_bucket.values()]

    def build_serving_set(self, progress: ProgressPort) -> None:
        """Everything without buckets, and one bucket of each kind."""
        programs = self._programs
        jobs: list[Job] = [(self._single, 0, programs.reset()), (self._single, 1, programs.admit())]
        jobs.append((self._single, 2, programs.admit_slot()))
        jobs += [(self.clear, group, programs.clear(group)) for group in range(len(self._setup.shape.groups))]
        if self._draft is not None:
            jobs += [(self._draft.single, place, job) for place, job in enumerate(self._draft.single_programs())]
        buckets = self._setup.buckets.serving(whole_prompts=self._setup.whole_prompts)
        jobs += self._jobs(buckets.tokens, buckets.rows)
        jobs.sort(key=lambda job: not job[2].name.startswith("forward"))   # the longest first
        with progress.task("compiling to serve", len(jobs), "programs") as advance:
            self._run(jobs, advance, threads=os.cpu_count() or 1)

    def build_rest(self, progress: ProgressPort | None, on_ready: Callable[[], None] | None) -> None:
        """Starts the background thread that builds every other bucket, and what is without prefill."""
        assert self._thread is None, "called once"
        self._thread = threading.Thread(
            target=self._build_rest, args=(progress or NoProgress(), on_ready), name="compile-rest", daemon=True
        )
        self._thread.start()

    def wait(self, timeout_s: float | None) -> bool:
        """Waits until ready; raises EngineError where a bucket could not be compiled."""
        self._done.wait(timeout_s)
        self.raise_failure()
        return self.is_ready

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise EngineError(f"compiling a step failed: {self._failure}") from self._failure

    def close(self) -> None:
        """Lets what is compiling now finish, and starts nothing more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _build_rest(self, progress: ProgressPort, on_ready: Callable[[], None] | None) -> None:
        buckets = self._setup.buckets
        try:
            jobs = self._jobs(_missing(buckets.tokens, self.token_buckets), _missing(buckets.rows, self.row_buckets))
            jobs += self._decode_jobs()     # last: a missing bucket costs more than an empty section
            with progress.task("compiling the rest", len(jobs), "programs") as advance:
                self._run(jobs, advance, threads=max(1, (os.cpu_count() or 1) // 2))
        except Exception as error:  # told to the engine's thread, which ends the process
            logger.exception("compiling failed")
            self._failure = error
        if self._closing.is_set():
            return
        if self._failure is None:
            self.compiler.seal()
        self._done.set()
        if self._failure is None and on_ready is not None:
            on_ready()

    def _jobs(self, tokens: tuple[int, ...], rows: tuple[int, ...]) -> list[Job]:
        programs = self._programs
        jobs: list[Job] = []
        for size in tokens:
            parts = self._forward_parts[size] = {}
            jobs += [(parts, place, program) for place, program in enumerate(programs.forward(size))]
            jobs.append((self.score, size, programs.score(size)))
            if self._draft is not None:
                jobs.append((self._draft.follow, size, self._draft.follow_program(size)))
        jobs += [(self.sample, size, programs.sample(size)) for size in rows]
        if self._draft is not None:
            writing = set(tokens) & set(self._draft.write_buckets)
            if not self._draft.write:     # to serve with: holds as many rows as there can be
                writing.add(self._draft.write_buckets[-1])
            writing -= self._draft.write.keys()
            jobs += [(self._draft.write, size, self._draft.write_program(size)) for size in sorted(writing)]
        return jobs

    def _decode_jobs(self) -> list[Job]:
        self._decode_parts = {size: {} for size in self._setup.decode_tokens}
        return [
            (parts, kind, program)
            for size, parts in self._decode_parts.items()
            for kind, program in enumerate(self._programs.decode_layers(size))
        ]

    def _run(self, jobs: list[Job], advance: Callable[[int], None], *, threads: int) -> None:
        def build(job: Job) -> None:
            if self._closing.is_set():
                return
            place, key, program = job
            executable = self.compiler.build(program)
            give_back()
            with self._lock:
                place[key] = executable
                self._join_forwards()
                self.token_buckets = tuple(sorted(size for size in self.forward if self._is_whole(size)))
                self.row_buckets = tuple(sorted(self.sample))
            advance(1)

        with ThreadPoolExecutor(min(threads, THREADS_MAX), thread_name_prefix="compile") as pool:
            for future in [pool.submit(build, job) for job in jobs]:
                future.result()


    def _is_whole(self, tokens: int) -> bool:
        """Whether all that a step of this bucket may need is there, besides its forward."""
        return tokens in self.score and (self._draft is None or tokens in self._draft.follow)

    def _join_forwards(self) -> None:
        """Forwards all of whose programs are there."""
        segments = self._programs.segments
        kind_count = max(segment.kind for segment in segments) + 1
        for size, parts in self._forward_parts.items():
            if size not in self.forward and len(parts) == kind_count + 2:
                begin, *kinds, finish = (parts[place] for place in range(len(parts)))
                self.forward[size] = StepForward(begin, tuple(kinds), finish, segments)
        for size, parts in self._decode_parts.items():
            if size in self.forward and size not in self.decode_forward and len(parts) == kind_count:
                kinds = [parts[kind] for kind in range(kind_count)]
                self.decode_forward[size] = replace(self.forward[size], run_layers=tuple(kinds))


def _missing(wanted: tuple[int, ...], there: tuple[int, ...]) -> tuple[int, ...]:
    """The largest first, because long prompts gain most; then from small to large."""
    return tuple(sorted(set(wanted) - set(there), key=lambda size: (size != wanted[-1], size)))


def temporary_bytes(executable: Executable) -> int:
    """Memory that one run takes besides its arguments: scratch, and outputs that reuse no donated buffer."""
    analysis = executable.memory_analysis()
    if analysis is None:
        return 0
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
