"""The pages of one KV group: who is free, who is in use, which content a page holds. Mutable.

Knows page ids, counts and opaque content keys; no sequence, no token, no device.
A page is in exactly one of four states (`check` verifies it):
- free:     no reference, no key;
- cached:   no reference, a key; the least recently used of these is taken when no page is free;
- used:     one reference a sequence that holds it, with or without a key;
- to clear: no reference, tainted by non-finite values; free again after `cleared`.
Invariant: a key names at most one page, a page has at most one key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Reference counts and the LRU of unreferenced cached pages."""

    def __init__(self, page_count: int) -> None:
        assert page_count >= 1
        self.page_count = page_count
        self.reset()

    def reset(self) -> None:
        """Every page free, nothing cached: the state after the device's pages were made anew."""
        self._free = list(range(self.page_count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * self.page_count
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._tainted: set[int] = set()
        self._to_clear: list[int] = []

    @property
    def available_count(self) -> int:
        """Pages that `take` can give now."""
        return len(self._free) + len(self._cached)

    @property
    def used_count(self) -> int:
        return self.page_count - len(self._free) - len(self._cached) - len(self._to_clear)

    @property
    def cached_count(self) -> int:
        """Unreferenced pages that still hold a known content."""
        return len(self._cached)

    @property
    def has_uncleared(self) -> bool:
        return bool(self._to_clear)

    def take(self, count: int) -> list[int]:
        """Gives `count` pages with one reference each; the caller has seen that they are available."""
        assert 0 <= count <= self.available_count, f"{count} pages wanted, {self.available_count} available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._refs[page] = 1
            pages.append(page)
        return pages

    def hold(self, page: int) -> int:
        """One more reference to a used or cached page."""
        if self._refs[page] == 0:
            del self._cached[page]
        self._refs[page] += 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """One reference less each; a keyed page that nobody holds is cached, younger than all before it."""
        for page in pages:
            refs = self._refs[page] = self._refs[page] - 1
            assert refs >= 0, f"page {page} was released more often than held"
            if refs:
                continue
            if page in self._tainted:
                self._to_clear.append(page)
            elif page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def find(self, key: bytes) -> int | None:
        """The page that holds this content."""
        return self._page_of.get(key)

    def publish(self, page: int, key: bytes) -> None:
        """Says what a used page holds; where another page holds the same already, that one stays the known one."""
        assert self._refs[page] > 0 and self._key_of.get(page, key) == key
        if key not in self._page_of and page not in self._tainted:
            self._page_of[key] = page
            self._key_of[page] = key

    def taint(self, page: int) -> None:
        """A used page may hold non-finite values: nobody finds it any more, and it is cleared before its next use."""
        assert self._refs[page] > 0
        self._tainted.add(page)
        self._forget(page)

    def uncleared(self) -> list[int]:
        """Tainted pages that nobody holds."""
        return list(self._to_clear)

    def cleared(self) -> None:
        """The device has zeroed (or will, before any later step) what `uncleared` named."""
        self._tainted.difference_update(self._to_clear)
        self._free.extend(self._to_clear)
        self._to_clear.clear()

    def flush(self) -> None:
        """Forgets all content: cached pages become free, used ones lose their key."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._page_of.clear()

    def check(self) -> None:
        """Asserts the invariants; linear in the pool."""
        free, cached, to_clear = set(self._free), set(self._cached), set(self._to_clear)
        used = {page for page, refs in enumerate(self._refs) if refs > 0}
        assert len(free) == len(self._free) and len(to_clear) == len(self._to_clear), "a page is listed twice"
        assert min(self._refs) >= 0
        parts = (free, cached, to_clear, used)
        assert sum(map(len, parts)) == self.page_count and len(set().union(*parts)) == self.page_count
        assert len(used) == self.used_count
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        assert cached <= self._key_of.keys() and not free & self._key_of.keys()
        assert to_clear <= self._tainted <= to_clear | used and not self._tainted & self._key_of.keys()

    def references(self) -> dict[int, int]:
        """References by used page, for checks against what the holders say."""
        return {page: refs for page, refs in enumerate(self._refs) if refs}

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
