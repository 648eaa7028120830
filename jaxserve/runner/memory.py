"""Who gets how much of the device's memory: weights, temporaries, state, a reserve, and KV pages from what is left.

Pure arithmetic over bytes, plus reading how much there is; compiles nothing. Sizes are of one device.
Invariant: what a plan grants fits the budget it was given; what cannot fit is refused with the table of what needs
what, before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from jaxserve.core.errors import CapacityError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.runner.page_budget import GroupPages, group_pages, most, share, usual

GIB = 1 << 30
CPU_POOL_BYTES = 2 * GIB          # KV pages of a CPU server when the user says nothing
CPU_BUDGET = 0.95                 # of the machine's memory; --gpu-memory-utilization is about GPUs
CPU_RESERVE_BYTES = GIB           # temporaries (malloc'd as they come), Python, the API process
GPU_RESERVE = 0.02                # of the budget: fragmentation, the allocator's own rounding, small transfers
GPU_RESERVE_BYTES_MIN = 256 << 20
PAGES_GRID_BITS = 5               # page counts keep five significant bits: at most 6 % of the pool is given up


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bytes there are, and how many of them are ours to plan with."""

    total_bytes: int
    budget_bytes: int
    reserve_bytes: int
    pool_bytes_default: int | None = None     # None: whatever is left


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTable:
    """The memory of one device as planned, zero where it is not settled yet; `lines` is for people."""

    budget: Budget
    weight_bytes: int = 0
    temporary_bytes: int = 0
    state_bytes: int = 0             # rows, page tables, shaping slots
    groups: tuple[GroupPages, ...] = ()
    page_size: int
    length_max: int = 0

    @property
    def page_bytes(self) -> int:
        """Of one page in every KV group."""
        return sum(group.page_bytes for group in self.groups)

    @property
    def pool_bytes(self) -> int:
        return sum(group.pool_bytes for group in self.groups)

    @property
    def concurrency(self) -> float:
        """Sequences of full length that fit at once."""
        if not self.length_max:
            return 0.0
        held = (group.page_count / group.held(self.length_max, self.page_size) for group in self.groups)
        return min(held, default=0.0)

    def pages(self) -> tuple[tuple[str, int, str], ...]:
        """Name, bytes and sizes of each group's pages, for people."""
        return tuple(
            (
                "KV pages" if group.window is None else f"KV, window {group.window:,}", group.pool_bytes,
                f"{group.page_count:,} pages x {self.page_size} slots = {group.page_count * self.page_size:,} tokens"
                + (f" in {group.layer_count} layers" if len(self.groups) > 1 else ""),
            )
            for group in self.groups
        )

    @property
    def left_bytes(self) -> int:
        """What the budget leaves for pages; negative where not even the rest fits."""
        fixed = self.weight_bytes + self.temporary_bytes + self.state_bytes + self.budget.reserve_bytes
        return self.budget.budget_bytes - fixed

    def lines(self) -> tuple[str, ...]:
        named = (
            ("device memory", self.budget.total_bytes, ""),
            ("to plan with", self.budget.budget_bytes, ""),
            ("weights", self.weight_bytes, ""),
            ("step temporaries", self.temporary_bytes, ""),
            ("row state", self.state_bytes, ""),
            ("reserve", self.budget.reserve_bytes, ""),
            ("left for KV pages", max(0, self.left_bytes), f"{self.page_bytes:,} B a page"),
            *self.pages(),
        )
        return tuple(f"  {name:18} {count / GIB:9.3f} GiB  {note}".rstrip() for name, count, note in named)


def machine_bytes() -> int:
    """Memory of this machine, or of the control group that the process lives in where that is less."""
    sizes = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue   # no such control group, or "max"
    return min(sizes)


def device_budget(device: jax.Device, *, utilization: float, device_count: int = 1) -> Budget:
    """What may be used of `device`; devices that are one CPU share its memory.

    On a GPU the allocator's own limit is the hard one; the composition root sets it to `utilization` of the total
    before jax starts.
    """
    if device.platform == "cpu":
        return cpu_budget(machine_bytes(), device_count=device_count)
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise CapacityError(f"{device.device_kind} does not tell its memory: serve on a CPU, CUDA or ROCm device.")
    limit = int(stats["bytes_limit"])
    return gpu_budget(int(limit / utilization), limit)


def cpu_budget(machine: int, *, device_count: int) -> Budget:
    """Of one of several devices that are the same processor with `machine` bytes."""
    total = machine // device_count
    return Budget(
        total_bytes=total,
        budget_bytes=int(total * CPU_BUDGET),
        reserve_bytes=min(CPU_RESERVE_BYTES // device_count, total // 4),
        pool_bytes_default=min(CPU_POOL_BYTES // device_count, total // 4),
    )


def gpu_budget(total: int, limit: int) -> Budget:
    """Of a GPU with `total` bytes, of which the allocator may take `limit`."""
    reserve = max(GPU_RESERVE_BYTES_MIN, int(limit * GPU_RESERVE))
    return Budget(total_bytes=total, budget_bytes=limit, reserve_bytes=reserve)


def tightest(budget: Budget, least: Callable[[Sequence[int]], tuple[int, ...]]) -> Budget:
    """What fits the budgets of all processes, so that all grant the same pages; `least` gives the least of theirs."""
    default = -1 if budget.pool_bytes_default is None else budget.pool_bytes_default
    total, ours, reserve, pool = least((budget.total_bytes, budget.budget_bytes, -budget.reserve_bytes, default))
    return Budget(
        total_bytes=total, budget_bytes=ours, reserve_bytes=-reserve, pool_bytes_default=None if pool < 0 else pool
    )


def grant_pages(
    *,
    spec: ModelSpec,
    draft: ModelSpec | None = None,
    budget: Budget,
    weight_bytes: int,
    temporary_bytes: int,
    state_bytes: int,
    page_size: int,
    itemsize: int,
    scale_bytes: int = 0,
    row_count: int,
    tokens_max: int,
    length_wanted: int | None,
    pool_bytes_wanted: int | None,
) -> MemoryTable:
    """Sizes the KV pool and, where it is not given, the longest sequence.

    Args:
      draft: a model that drafts: the same pages, with its keys and values behind the served model's.
      itemsize, scale_bytes: of a stored number, and of a scale beside a slot and head's codes.
      tokens_max: tokens of the largest step.
      length_wanted: --max-model-len; None is as long as the model and the pool allow.
      pool_bytes_wanted: --kv-cache-memory-bytes; None is by device.
    """
    table = MemoryTable(
        budget=budget, weight_bytes=weight_bytes, temporary_bytes=temporary_bytes, state_bytes=state_bytes,
        groups=group_pages(spec.kv_groups, page_size, itemsize, scale_bytes), page_size=page_size,
    )
    if draft is not None:
        more = draft.kv_groups[0].page_bytes(page_size, itemsize)
        table = replace(table, groups=tuple(replace(g, page_bytes=g.page_bytes + more) for g in table.groups))
    if pool_bytes_wanted is not None:
        pool_bytes = pool_bytes_wanted
    elif budget.pool_bytes_default is not None:
        pool_bytes = min(budget.pool_bytes_default, table.left_bytes)
    else:
        pool_bytes = table.left_bytes
    if pool_bytes > table.left_bytes or pool_bytes < table.page_bytes:
        raise _refusal(table, pool_bytes_wanted)
    longest = length_wanted if length_wanted is not None else spec.context_length
    limits = [
        most(group, length=longest, page_size=page_size, row_count=row_count, tokens_max=tokens_max)
        for group in table.groups
    ]
    parts = [usual(group, length=longest, page_size=page_size) for group in table.groups]
    counts = share(table.groups, pool_bytes, limits, parts, _on_grid)
    table = replace(table, groups=tuple(
        replace(group, page_count=count) for group, count in zip(table.groups, counts, strict=True)
    ))
    capacity = _longest(table, longest)
    if length_wanted is not None and length_wanted > capacity:
        raise _too_long(table, length_wanted, capacity, pool_bytes)
    if capacity < 1:
        raise _refusal(table, pool_bytes_wanted)
    return replace(table, length_max=capacity)


def _longest(table: MemoryTable, longest: int) -> int:
    """The longest sequence, up to `longest`, that could run alone."""
    size = table.page_size
    for group in table.groups:
        if group.window is None or group.page_count < group.held(longest, size):
            longest = min(longest, group.page_count * size)
    return longest


def _too_long(table: MemoryTable, length_wanted: int, capacity: int, pool_bytes: int) -> CapacityError:
    return CapacityError(
        f"max-model-len {length_wanted:,} needs more KV pages than fit: lower --max-model-len to at most "
        f"{capacity:,}, or raise "
        f"{'--kv-cache-memory-bytes' if pool_bytes < table.left_bytes else '--gpu-memory-utilization'}.\n"
        + "\n".join(replace(table, length_max=length_wanted).lines())
    )


def _refusal(table: MemoryTable, pool_bytes_wanted: int | None) -> CapacityError:
    if pool_bytes_wanted is not None and pool_bytes_wanted < table.page_bytes:
        reason = (
            f"kv-cache-memory-bytes {pool_bytes_wanted:,} is less than one page ({table.page_bytes:,} bytes): raise it."
        )
    elif pool_bytes_wanted is not None:
        reason = (
            f"kv-cache-memory-bytes {pool_bytes_wanted:,} does not fit: {max(0, table.left_bytes):,} bytes are left "
            "for KV pages; lower it, or serve a smaller model."
        )
    else:
        reason = (
            "the model does not fit: nothing is left for KV pages; lower --max-num-batched-tokens or --max-num-seqs, "
            "raise --gpu-memory-utilization, or serve a smaller model or dtype."
        )
    return CapacityError(reason + "\n" + "\n".join(table.lines()))


def _on_grid(count: int) -> int:
    """`count` rounded down to five significant bits: starts that find a little more or less memory free compile the
    same shapes, and so find their programs in the store."""
    grid = 1 << max(0, count.bit_length() - PAGES_GRID_BITS)
    return count // grid * grid
