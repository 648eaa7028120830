"""The pages that sequences hold, over all KV groups: grow, slide, share, give back. Mutable through its pools.

Every group has its own pool and its own table a sequence; tables are aligned: index i of each covers the positions
[i*S, (i+1)*S). A group with a window keeps only pages that a position not yet committed may still look at: the query
at q looks at [q - window + 1, q], so pages wholly before `computed - window + 1` go back at commit.
It knows no plan, no row and no policy. Invariant: a page's references are the tables that name it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from jaxserve.core.plan import KvGroupShape
from jaxserve.engine.page_pool import PagePool
from jaxserve.engine.sequence import NO_PAGE, Sequence


class KvGroups:
    """Pools and windows of all KV groups."""

    def __init__(self, groups: tuple[KvGroupShape, ...], *, page_size: int) -> None:
        self.page_size = page_size
        self.pools = tuple(PagePool(group.page_count) for group in groups)
        self.windows = tuple(group.window for group in groups)
        self.is_windowed = any(window is not None for window in self.windows)

    @property
    def page_count(self) -> int:
        return sum(pool.page_count for pool in self.pools)

    @property
    def used_count(self) -> int:
        return sum(pool.used_count for pool in self.pools)

    def pages(self, length: int) -> int:
        """Pages that `length` positions fill."""
        return -(-length // self.page_size)

    def first_page(self, group: int, position: int) -> int:
        """Index of the first page that a query at `position` or later looks at."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.page_size

    def need(self, group: int, length: int, whole: int) -> int:
        """Pages of the group without which a sequence cannot come to `length` positions.

        With a window it suffices to hold the window, one token in flight and one to plan, unless a prefill of `whole`
        positions must fit at once: window - 1 + 2 tokens touch at most (window - 1) // S + 2 pages.
        """
        window = self.windows[group]
        if window is None:
            return self.pages(length)
        return min(self.pages(length), max((window - 1) // self.page_size + 2, self.pages(whole)))

    def still_needed(self, sequence: Sequence, length: int) -> list[int]:
        """For each group, pages to take before the sequence can have come to `length` positions."""
        whole = 0 if sequence.may_split else length
        held = sequence.capacity // self.page_size
        return [
            min(self.pages(length) - held, self.need(group, length, whole) - (held - sequence.slid[group]))
            for group in range(len(self.pools))
        ]

    def has_available(self, counts: Iterable[int]) -> bool:
        return all(count <= pool.available_count for count, pool in zip(counts, self.pools, strict=True))

    def reach(self, sequence: Sequence) -> int:
        """Positions that the sequence could cover now if it took every available page."""
        return sequence.capacity + min(pool.available_count for pool in self.pools) * self.page_size

    def grow(self, sequence: Sequence, length: int) -> None:
        """Takes pages until the tables cover `length` positions, which `reach` has shown to be possible."""
        count = self.pages(length - sequence.capacity)
        if count <= 0:
            return
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            table.extend(pool.take(count))
        sequence.capacity += count * self.page_size

    def adopt(self, sequence: Sequence, pages: list[list[int]]) -> None:
        """Starts empty tables with shared pages (NO_PAGE where none is needed), equally many in each group."""
        for group, (table, pool) in enumerate(zip(sequence.tables, self.pools, strict=True)):
            table.extend(page if page == NO_PAGE else pool.hold(page) for page in pages[group])
            sequence.slid[group] = table.count(NO_PAGE)
        sequence.capacity = len(pages[0]) * self.page_size

    def slide(self, sequence: Sequence) -> None:
        """Gives back pages that no position after the committed ones looks at."""
        for group, table in enumerate(sequence.tables):
            first = min(self.first_page(group, sequence.computed), len(table))
            slid = sequence.slid[group]
            if first > slid:
                self.pools[group].release(table[slid:first])
                table[slid:first] = [NO_PAGE] * (first - slid)
                sequence.slid[group] = first

    def release(self, sequence: Sequence) -> None:
        """Gives back everything, last pages first: of a cached prefix the end is evicted before the beginning."""
        for group, table in enumerate(sequence.tables):
            self.pools[group].release(reversed(table[sequence.slid[group]:]))
            table.clear()
            sequence.slid[group] = 0
        sequence.capacity = 0

    def taint(self, sequence: Sequence) -> None:
        """Whatever the sequence holds may hold non-finite values, shared pages included: who knows which."""
        for group, table in enumerate(sequence.tables):
            for page in table[sequence.slid[group]:]:
                self.pools[group].taint(page)

    def reset(self) -> None:
        for pool in self.pools:
            pool.reset()

    def check(self, holders: Iterable[Sequence]) -> None:
        """Asserts that pools are sound and that `holders` explain every reference."""
        expected = [Counter[int]() for _ in self.pools]
        for sequence in holders:
            for group, table in enumerate(sequence.tables):
                slid = sequence.slid[group]
                assert len(table) * self.page_size == sequence.capacity
                assert all(page == NO_PAGE for page in table[:slid]) and NO_PAGE not in table[slid:]
                assert slid <= self.first_page(group, sequence.computed)
                expected[group].update(table[slid:])
        for pool, references in zip(self.pools, expected, strict=True):
            pool.check()
            assert pool.references() == dict(references), "a page is lost or held by nobody"
