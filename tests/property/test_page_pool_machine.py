"""The page pool against a model in three dictionaries: no page lost, none given twice, LRU order kept."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.engine.page_pool import PagePool


class PoolMachine(RuleBasedStateMachine):
    """Takes, shares, publishes, taints and gives back in any order; the model says what must hold."""

    @initialize(count=st.integers(1, 12))
    def start(self, count: int) -> None:
        self.pool = PagePool(count)
        self.held: list[int] = []            # one entry a reference
        self.key_of: dict[int, bytes] = {}
        self.cached: list[int] = []          # unreferenced pages with a key, oldest first
        self.tainted: set[int] = set()
        self.to_clear: set[int] = set()

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        free = self.pool.page_count - len(set(self.held)) - len(self.to_clear)
        assert self.pool.available_count == free
        count = data.draw(st.integers(0, free))
        pages = self.pool.take(count)
        assert len(set(pages)) == count and not set(pages) & (set(self.held) | self.to_clear)
        evicted = [page for page in self.cached if page in pages]
        assert evicted == self.cached[: len(evicted)], "not the least recently used"
        assert not evicted or free - count <= len(self.cached) - len(evicted), "evicted while a page was free"
        for page in evicted:
            self.cached.remove(page)
            assert self.pool.find(self.key_of.pop(page)) is None
        self.held += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(set(self.held))), unique=True, max_size=6))
        self.pool.release(pages)
        for page in pages:
            self.held.remove(page)
            if page in self.held:
                continue
            if page in self.tainted:
                self.to_clear.add(page)
            elif page in self.key_of:
                self.cached.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from(sorted(set(self.held) - self.key_of.keys()) or [-1]))
        if page < 0:
            return
        self.pool.publish(page, key)
        if key not in self.key_of.values() and page not in self.tainted:
            self.key_of[page] = key

    @precondition(lambda self: self.key_of)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.key_of)))
        found = self.pool.find(self.key_of[page])
        assert found == page
        self.pool.hold(page)
        self.held.append(page)
        if page in self.cached:
            self.cached.remove(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def taint(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(set(self.held))))
        self.pool.taint(page)
        self.tainted.add(page)
        self.key_of.pop(page, None)

    @rule()
    def clear(self) -> None:
        assert set(self.pool.uncleared()) == self.to_clear
        self.pool.cleared()
        self.tainted -= self.to_clear
        self.to_clear.clear()

    @rule()
    def flush(self) -> None:
        self.pool.flush()
        self.key_of.clear()
        self.cached.clear()

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.used_count == len(set(self.held))
        assert self.pool.cached_count == len(self.cached)
        for page, key in self.key_of.items():
            assert self.pool.find(key) == page


def test_any_use_of_the_pool_keeps_its_books() -> None:
    run_state_machine_as_test(
        PoolMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
    )
