"""A plan for people (tables) and for programs (JSON). Decides nothing."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from jaxserve.plan.planner import Plan, Refusal
from jaxserve.plan.roofline import LINK_LATENCY_S, NETWORK_LATENCY_S, Bound
from jaxserve.start_report import size

ASSUMPTIONS = (
    "rates are upper bounds from published peaks (dense products, memory, links); nothing here was measured",
    "reading memory and multiplying overlap wholly; messages between devices overlap with nothing",
    f"a message waits {LINK_LATENCY_S * 1e6:.0f} µs within a machine, {NETWORK_LATENCY_S * 1e6:.0f} µs more between "
    "machines (assumed)",
    "each token chooses its experts freely, all equally likely; steps are full; the host keeps up",
    "replicas share nothing and get equal work; sizes of messages are before devices share them out",
)
_TEMPORARIES = {
    "formula": "an estimate by formula", "compiler": "by XLA's memory analysis, compiled for the device",
    "none": "out of the reserve, as a start on a CPU plans them",
}
WIDTH = 120     # where stdout is no terminal


def lines(plan: Plan) -> list[tuple[str, str]]:
    """What is planned, in words."""
    setup, question, memory = plan.sized.setup, plan.question, plan.memory
    config = question.config
    how = "whole experts" if config.parallel.enable_expert_parallel else "tensor parallel"
    return [
        ("model", f"{question.model} ({setup.spec.family}, {plan.parameter_count / 1e9:,.2f} G parameters, "
                  f"{setup.dtype.name})"),
        ("devices", f"{question.devices}: {question.replicas} replica(s) of {config.parallel.tensor_parallel_size} "
                    f"device(s), {how}"),
        ("longest sequence", f"{memory.length_max:,} tokens, {memory.concurrency:.1f} of them at once"),
        ("a step holds", f"up to {setup.buckets.tokens_max:,} tokens of up to {setup.shape.row_count} sequences"),
    ]


def to_json(answer: Plan | Refusal) -> dict[str, Any]:
    """Plain values; bytes and seconds."""
    question = answer.question
    head = {
        "model": question.model, "devices": str(question.devices), "fits": isinstance(answer, Plan),
        "tensor_parallel_size": question.config.parallel.tensor_parallel_size, "replicas": question.replicas,
    }
    if isinstance(answer, Refusal):
        return head | {
            "reason": answer.reason,
            "nearest": [{"change": change.words, "plan": to_json(change.plan)} for change in answer.nearest],
        }
    setup, memory = answer.sized.setup, answer.memory
    return head | {
        "parameter_count": answer.parameter_count, "dtype": setup.dtype.name,
        "quantization": answer.sized.quantization or None,
        "per_device": {
            "memory_bytes": memory.budget.total_bytes, "budget_bytes": memory.budget.budget_bytes,
            "weight_bytes": memory.weight_bytes, "temporary_bytes": memory.temporary_bytes,
            "state_bytes": memory.state_bytes, "reserve_bytes": memory.budget.reserve_bytes,
            "kv_pages": [
                {"window": group.window, "pages": group.page_count, "bytes": group.pool_bytes}
                for group in memory.groups
            ],
        },
        "temporaries_by": answer.temporaries_by, "max_model_len": memory.length_max,
        "concurrency": memory.concurrency, "max_num_seqs": setup.shape.row_count,
        "max_num_batched_tokens": setup.buckets.tokens_max,
        "fits_at_once": [{"length": length, "sequences": count} for length, count in answer.fits],
        "context": answer.context, "decode": [_bound(bound, answer) for bound in answer.decode],
        "prefill": None if answer.prefill is None else _bound(answer.prefill, answer),
        "assumptions": list(ASSUMPTIONS),
    }


def _bound(bound: Bound, plan: Plan) -> dict[str, Any]:
    sent = bound.messages
    return {
        "tokens": bound.step.tokens, "sequences": bound.step.samples, "step_s": bound.seconds,
        "multiply_s": bound.multiply_s, "read_s": bound.read_s, "messages_s": bound.messages_s,
        "limited_by": bound.limit, "tokens_s": bound.tokens_s * plan.question.replicas,
        "messages": {
            "count": sent.count, "all_reduce_bytes": sent.reduce_bytes, "all_to_all_bytes": sent.logits_bytes,
            "all_gather_bytes": sent.gather_bytes,
        },
    }


def show(answer: Plan | Refusal, console: Console) -> None:
    """Prints the tables, or the refusal and what would fit."""
    for part in renderables(answer):
        console.print(part)


def renderables(answer: Plan | Refusal) -> list[RenderableType]:
    if isinstance(answer, Refusal):
        return _refusal(answer)
    parts: list[RenderableType] = [_words(answer), _memory(answer), _fits(answer)]
    if answer.prefill is not None:
        parts.append(_rates(answer))
    else:
        parts.append(Text("No rates: what this device can do is not published; scripts/ceilings.py measures it.\n"))
    notes = ASSUMPTIONS if answer.prefill is not None else ()
    return [*parts, Text("\n".join(f"- {note}" for note in notes))]


def _refusal(answer: Refusal) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(f"{answer.question.model} on {answer.question.devices}: {answer.reason}\n")]
    if not answer.nearest:
        parts.append(Text("Nothing near it fits either."))
    for change in answer.nearest:
        memory = change.plan.memory
        parts.append(Text(
            f"This fits: {change.words}\n  weights {size(memory.weight_bytes)}, KV pages {size(memory.pool_bytes)} a "
            f"device; longest sequence {memory.length_max:,} tokens, {memory.concurrency:.1f} of them at once\n"
        ))
    return parts


def _words(plan: Plan) -> Table:
    table = Table(title="jaxserve plan", title_justify="left", box=SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines(plan):
        table.add_row(name, value)
    return table


def memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Name, size and note of each part of a device's memory."""
    memory = plan.memory
    return [
        ("device memory", size(memory.budget.total_bytes), f"{size(memory.budget.budget_bytes)} to plan with"),
        ("weights", size(memory.weight_bytes), plan.sized.quantization),
        ("step temporaries", size(memory.temporary_bytes), _TEMPORARIES[plan.temporaries_by]),
        ("row state", size(memory.state_bytes), ""),
        ("reserve", size(memory.budget.reserve_bytes), ""),
        *((name, size(count), sizes) for name, count, sizes in memory.pages()),
    ]


def rate_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Step, its size, milliseconds, tokens a second, what limits it, messages and their bytes."""
    found = []
    for name, bound in [*(("decode", bound) for bound in plan.decode), ("prefill", plan.prefill)]:
        if bound is None:
            continue
        spent = f"{bound.multiply_s * 1e3:.2f} / {bound.read_s * 1e3:.2f} / {bound.messages_s * 1e3:.2f}"
        found.append((
            name, f"{bound.step.samples if name == 'decode' else bound.step.tokens:,}", f"{bound.seconds * 1e3:.2f}",
            spent, f"{bound.tokens_s * plan.question.replicas:,.0f}", bound.limit,
            f"{bound.messages.count} x, {size(bound.messages.total_bytes)}" if bound.messages.count else "none",
        ))
    return found


def _memory(plan: Plan) -> Table:
    table = Table(title="each device's memory", title_justify="left", box=SIMPLE, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for row in memory_rows(plan):
        table.add_row(*row)
    return table


def _fits(plan: Plan) -> Table:
    table = Table(title="sequences at once", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("of tokens", justify="right")
    table.add_column("sequences", justify="right")
    for length, count in plan.fits:
        table.add_row(f"{length:,}", f"{count:,}")
    return table


def _rates(plan: Plan) -> Table:
    title = f"at most, with sequences of {plan.context:,} tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in ("step", "of", "ms", "products/memory/messages", "tokens/s, all", "limit", "messages"):
        table.add_column(name, justify="left" if name in ("step", "limit") else "right")
    for row in rate_rows(plan):
        table.add_row(*row)
    return table
