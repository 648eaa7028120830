"""One plan: sizes of a replica, what fits, the roofline; or why not, and the nearest configuration that does.

Invariant: a plan that fits is one that a start grants by the same arithmetic; a change that is proposed was tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import CapacityError, ConfigError
from jaxserve.plan.devices import Devices
from jaxserve.plan.roofline import Bound, Roofline, Step
from jaxserve.plan.sizes import Measure, Mesh, Sized, Sizer
from jaxserve.runner.memory import MemoryTable

CONTEXT = 4096                  # positions of a sequence that rates are stated for, where nothing is said
BATCHES = (1, 8, 32, 128)       # and the most that fit
UTILIZATION_MAX = 0.95
HOSTS_MAX = 8                   # of a proposal


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Attributes:
    replicas: copies of the model, each on its own devices.  context: positions of a sequence in the rates.
    """

    model: str
    config: EngineConfig
    devices: Devices
    context: int | None = None

    @property
    def replicas(self) -> int:
        return self.devices.count // self.config.parallel.tensor_parallel_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Attributes:
    temporaries_by: "compiler", "formula", or "none" where a start does not weigh them (CPU).
    fits: length, and how many sequences of it run at once in one replica.
    decode, prefill: bounds of one replica's steps; none where the device's figures are not published.
    """

    question: Question
    sized: Sized
    parameter_count: int
    temporaries_by: str
    context: int
    fits: tuple[tuple[int, int], ...]
    decode: tuple[Bound, ...]
    prefill: Bound | None

    @property
    def memory(self) -> MemoryTable:
        return self.sized.setup.memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A configuration that fits, and how it differs from the one that does not."""

    words: str
    plan: Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a model does not fit, with the table of what needs what, and what would; nothing where nothing was found."""

    question: Question
    reason: str
    nearest: tuple[Change, ...]


def plan(question: Question, sizer: Sizer, measure: Measure, temporaries_by: str, mesh: Mesh | None = None) -> Plan:
    """Raises CapacityError where the model does not fit, ConfigError where it cannot be so at all."""
    config, devices = question.config, question.devices
    sized = sizer.size(config, devices.kind, measure, mesh)
    memory = sized.setup.memory
    context = min(question.context or CONTEXT, memory.length_max)
    roofline = Roofline(sized=sized, devices=devices)
    most = running(memory, context, sized.setup.shape.row_count)
    batches = sorted({*(batch for batch in BATCHES if batch < most), most})
    tokens = sized.setup.buckets.tokens_max
    return Plan(
        question=question, sized=sized, temporaries_by="none" if devices.kind.is_cpu else temporaries_by,
        context=context,
        parameter_count=sizer.parameter_count(),
        fits=tuple((length, running(memory, length, sized.setup.shape.row_count)) for length in _lengths(memory)),
        decode=_present(roofline.bound(Step.decode(batch, context)) for batch in batches),
        prefill=roofline.bound(Step.prefill(tokens, min(context, tokens))),
    )


def plan_or_refuse(
    question: Question, sizer: Sizer, measure: Measure, temporaries_by: str, mesh: Mesh | None, guess: Measure,
) -> Plan | Refusal:
    """`guess` measures the temporaries of what is tried in its stead."""
    try:
        return plan(question, sizer, measure, temporaries_by, mesh)
    except CapacityError as error:
        return Refusal(question=question, reason=str(error), nearest=tuple(_nearest(question, sizer, guess)))


def running(memory: MemoryTable, length: int, row_count: int) -> int:
    """Sequences of that length that run at once."""
    held = min(group.page_count // group.held(length, memory.page_size) for group in memory.groups)
    return min(held, row_count)


def _nearest(question: Question, sizer: Sizer, guess: Measure) -> Iterator[Change]:
    """The first change that fits on the same devices, and the first that fits on more of them."""
    for kind in (_on_the_same, _on_more):
        for words, other in kind(question):
            try:
                found = plan(other, sizer, guess, "formula")
            except (CapacityError, ConfigError):
                continue
            yield Change(words=words, plan=found)
            break


def _on_the_same(question: Question) -> Iterator[tuple[str, Question]]:
    """Changes from small to large: what keeps every limit, then length, then batch, then precision."""
    config, count = question.config, question.devices.count
    small = replace(config, scheduler=replace(config.scheduler, max_num_batched_tokens=2048, max_num_seqs=64))
    packed = replace(config, model=replace(config.model, quantization="int8"))
    bases = [("", config), ("--max-num-batched-tokens 2048 --max-num-seqs 64", small)]
    if config.model.quantization is None:
        bases.append(("--quantization int8", packed))
    for base_words, base in bases:
        free = replace(base, model=replace(base.model, max_model_len=None))
        for words, settled in ((base_words, base), (_joined(base_words, "--max-model-len auto"), free)):
            yield from _splits(question, words, settled, count)


def _splits(question: Question, words: str, config: EngineConfig, count: int) -> Iterator[tuple[str, Question]]:
    """The same configuration with more of the memory, and with larger parts of the devices a replica."""
    given, used = config.parallel.tensor_parallel_size, config.cache.gpu_memory_utilization
    for size in (size for size in range(given, count + 1) if count % size == 0):
        for share in sorted({used, max(used, UTILIZATION_MAX)}):
            changes = _joined(
                "" if size == given else f"--tensor-parallel-size {size}", words,
                "" if share == used else f"--gpu-memory-utilization {share}",
            )
            if changes:
                yield changes, replace(question, config=replace(
                    config, parallel=replace(config.parallel, tensor_parallel_size=size),
                    cache=replace(config.cache, gpu_memory_utilization=share),
                ))


def _on_more(question: Question) -> Iterator[tuple[str, Question]]:
    """Twice as many devices, and again: of one machine while it holds them, then more machines."""
    devices, config = question.devices, question.config
    while devices.hosts < HOSTS_MAX:
        if devices.per_host < 8:
            devices = replace(devices, per_host=min(8, 2 * devices.per_host))
        else:
            devices = replace(devices, hosts=2 * devices.hosts)
        other = replace(config, parallel=replace(config.parallel, tensor_parallel_size=devices.count))
        yield f"--devices {devices}", replace(question, config=other, devices=devices)


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def _lengths(memory: MemoryTable) -> list[int]:
    """Powers of four from 1,024 on, and the longest."""
    lengths = [length for length in (1024, 4096, 16384, 65536, 262144) if length < memory.length_max]
    return [*lengths, memory.length_max]


def _present(bounds: Iterator[Bound | None]) -> tuple[Bound, ...]:
    return tuple(bound for bound in bounds if bound is not None)
