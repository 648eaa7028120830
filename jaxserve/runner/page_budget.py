"""How many pages each KV group gets of a pool: groups that see everything share what windows leave over.

A sliding window never holds more than its newest positions of each row and the tokens of the steps in flight; pages
beyond that would lie idle. Where not everything fits, groups are sized for sequences of a quarter of the longest: most
requests are far shorter than what a server allows. Pure arithmetic; knows no device.
Invariant: the pages granted take no more bytes than the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.core.model_spec import KvGroup

STEPS_IN_FLIGHT = 2
USUAL_PART = 4      # of the longest sequence: what groups are balanced for


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPages:
    """One group's part of the pool."""

    window: int | None
    layer_count: int
    page_bytes: int
    page_count: int = 0

    @property
    def pool_bytes(self) -> int:
        return self.page_count * self.page_bytes

    def held(self, length: int, page_size: int) -> int:
        """Pages that one sequence of that length holds while it decodes."""
        pages = -(-length // page_size)
        return pages if self.window is None else min(pages, (self.window - 1) // page_size + 2)


def group_pages(
    groups: Sequence[KvGroup], page_size: int, itemsize: int, scale_bytes: int = 0
) -> tuple[GroupPages, ...]:
    """The groups of a model, with no pages yet."""
    return tuple(
        GroupPages(
            window=group.window, layer_count=len(group.layers),
            page_bytes=group.page_bytes(page_size, itemsize, scale_bytes),
        )
        for group in groups
    )


def usual(group: GroupPages, *, length: int, page_size: int) -> int:
    """Pages that a sequence of usual length holds."""
    return group.held(max(1, length // USUAL_PART), page_size)


def most(group: GroupPages, *, length: int, page_size: int, row_count: int, tokens_max: int) -> int:
    """Pages that a group can have use for: every row at full length, and for a window the steps in flight."""
    pages = row_count * -(-length // page_size)
    if group.window is None:
        return pages
    in_flight = STEPS_IN_FLIGHT * -(-tokens_max // page_size)
    return min(pages, row_count * group.held(length, page_size) + in_flight)


def share(
    groups: Sequence[GroupPages], pool_bytes: int, limits: Sequence[int], parts: Sequence[int],
    on_grid: Callable[[int], int],
) -> tuple[int, ...]:
    """Page counts: as many as fit, in proportion to `parts`, and none above its limit.

    Args:
      limits: the most pages each group has use for.  on_grid: rounds a count down.
    """
    counts: dict[int, int] = {}
    left = pool_bytes
    while len(counts) < len(groups):
        open_ = [index for index in range(len(groups)) if index not in counts]
        unit = sum(groups[index].page_bytes * parts[index] for index in open_)
        fair = {index: on_grid(left * parts[index] // unit) for index in open_}
        full = [index for index in open_ if limits[index] <= fair[index]]
        for index in full or open_:
            counts[index] = min(limits[index], fair[index])
            left -= counts[index] * groups[index].page_bytes
    return tuple(counts[index] for index in range(len(groups)))
