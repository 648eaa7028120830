"""Which computed pages can be shared, and which are about to be. Mutable.

The key of page i is SHA-256 over the key of page i-1 and the page's tokens; the chain starts at the cache salt, so
equal keys mean equal salt and equal tokens from position 0 on. Pages get a key only at commit, when they are
computed. Pages that an admitted sequence will compute are *promised*: who needs one of them next waits for it.
It knows no rows, no plans and no policy beyond ranks.
Invariant: only full pages are shared, and never the one that a sequence's last known token falls into, so at least
one token is left to compute.
"""

from __future__ import annotations

import hashlib

from jaxserve.engine.kv_groups import KvGroups
from jaxserve.engine.sequence import NO_PAGE, Sequence


class PrefixCache:
    """Finds, promises and publishes pages by content."""

    def __init__(self, kv: KvGroups, *, is_enabled: bool) -> None:
        self._kv = kv
        self._size = kv.page_size
        self._promised: dict[bytes, Sequence] = {}
        self.is_enabled = is_enabled

    def find(self, sequence: Sequence) -> list[list[int]] | None:
        """For each KV group the leading pages that need not be computed; None says: wait, the next is on its way."""
        groups = len(self._kv.pools)
        if not self.is_enabled or sequence.is_scoring:
            return [[] for _ in range(groups)]
        keys = self._keys(sequence, (sequence.known - 1) // self._size)
        if groups == 1 and not self._kv.is_windowed:
            pages = self._run(0, keys)
            count, found = len(pages), [pages]
        else:
            count, found = self._longest(keys)
        owner = self._promised.get(keys[count]) if count < len(keys) else None
        if owner is not None and owner is not sequence and owner.rank[0] <= sequence.rank[0]:
            return None   # waiting for one of lower class would be priority turned upside down
        return found

    def admit(self, sequence: Sequence, page_count: int) -> None:
        """The sequence starts with `page_count` shared pages and promises the other full pages of what it knows."""
        sequence.published = sequence.promised = page_count
        if not self.is_enabled:
            return
        sequence.promised = sequence.known // self._size
        for key in self._keys(sequence, sequence.promised)[page_count:]:
            self._promised.setdefault(key, sequence)

    def publish(self, sequence: Sequence) -> None:
        """Makes the pages known that are full and committed by now."""
        full = sequence.computed // self._size
        if full <= sequence.published or not self.is_enabled:
            return
        keys = self._keys(sequence, full)
        for index in range(sequence.published, full):
            for table, pool in zip(sequence.tables, self._kv.pools, strict=True):
                if table[index] != NO_PAGE:
                    pool.publish(table[index], keys[index])
            if index < sequence.promised:
                self._keep(keys[index], sequence)
        sequence.published = full

    def withdraw(self, sequence: Sequence) -> None:
        """The sequence stops computing: what it promised and has not published will not come."""
        for key in sequence.page_keys[sequence.published : sequence.promised]:
            self._keep(key, sequence)
        sequence.promised = sequence.published

    def flush(self) -> None:
        """Forgets all content; promises stay, they are kept by later commits."""
        for pool in self._kv.pools:
            pool.flush()

    def reset(self) -> None:
        """Forgets promises, too: the pools were made anew."""
        self._promised.clear()

    def check(self, owners: set[Sequence]) -> None:
        """Asserts that only running sequences have promised anything."""
        for key, owner in self._promised.items():
            assert owner in owners, "a promise outlived its sequence"
            assert key in owner.page_keys[owner.published : owner.promised]

    def _keep(self, key: bytes, sequence: Sequence) -> None:
        if self._promised.get(key) is sequence:
            del self._promised[key]

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """The keys of the first `count` pages, which are full of known tokens; computed once."""
        keys, size = sequence.page_keys, self._size
        assert count * size <= sequence.known
        if len(keys) < count:
            previous = keys[-1] if keys else _root(sequence.request.cache_salt, is_long=sequence.is_long)
            tokens = sequence.token_ids[: count * size].astype("<i4", copy=False).tobytes()
            for index in range(len(keys), count):
                previous = hashlib.sha256(previous + tokens[index * size * 4 : (index + 1) * size * 4]).digest()
                keys.append(previous)
        return keys[:count] if len(keys) > count else keys

    def _run(self, group: int, keys: list[bytes]) -> list[int]:
        """Cached pages of the group from the first key on, without a gap."""
        pages = []
        find = self._kv.pools[group].find
        for key in keys:
            page = find(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def _longest(self, keys: list[bytes]) -> tuple[int, list[list[int]]]:
        """The longest prefix that every group can start from.

        A full-attention group needs all its pages; a windowed one those that the first computed position looks at.
        """
        kv, reach = self._kv, len(keys)
        for group, window in enumerate(kv.windows):
            if window is None:
                reach = len(self._run(group, keys[:reach]))
        possible = [True] * (reach + 1)
        for group, window in enumerate(kv.windows):
            if window is None:
                continue
            run = 0   # cached pages without a gap, up to and including the page before `count`
            for count in range(1, reach + 1):
                run = run + 1 if kv.pools[group].find(keys[count - 1]) is not None else 0
                possible[count] &= run >= count - kv.first_page(group, count * self._size)
        count = max(n for n in range(reach + 1) if possible[n])
        found = []
        for group, pool in enumerate(kv.pools):
            first = kv.first_page(group, count * self._size)
            pages = [pool.find(key) for key in keys[first:count]]
            found.append([NO_PAGE] * min(first, count) + [page for page in pages if page is not None])
        return count, found


def _root(salt: str | None, *, is_long: bool) -> bytes:
    """Where a chain starts: no salt and an empty salt are different, and so are keys that turned another way."""
    turned = b"\1" if is_long else b"\0"
    return hashlib.sha256(turned + (b"\0" if salt is None else b"\1" + salt.encode("utf-8", "surrogatepass"))).digest()
