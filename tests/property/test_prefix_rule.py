"""The prefix cache against a brute-force reading of its rule, over groups with and without windows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.kv_groups import KvGroups
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.sequence import NO_PAGE, Sequence
from tests.engine_harness import make_request
from tests.fakes import make_shape

SIZE = 3


def _sequence(number: int, prompt: list[int], groups: int, salt: str | None, priority: int = 0) -> Sequence:
    return Sequence(
        make_request(str(number), prompt, cache_salt=salt, max_tokens=1),
        rank=(priority, number), length_max=1000, group_count=groups, may_split=True,
    )


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=16)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    windows=st.sampled_from([(None,), (4,), (None, 1), (None, 5), (2, None, 7)]),
    lives=st.lists(st.tuples(prompts, st.sampled_from([None, "s"]), st.integers(0, 16)), max_size=6),
    evictions=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=6),
    asked=prompts,
    salt=st.sampled_from([None, "s"]),
)
def test_the_longest_usable_prefix_is_found(
    windows: tuple[int | None, ...], lives: list[tuple[list[int], str | None, int]],
    evictions: list[tuple[int, int]], asked: list[int], salt: str | None,
) -> None:
    kv = KvGroups(make_shape(pages=30, windows=windows).groups, page_size=SIZE)
    cache = PrefixCache(kv, is_enabled=True)
    known: list[set[tuple[object, ...]]] = [set() for _ in windows]     # (salt, tokens up to the page's end)
    for number, (prompt, its_salt, computed) in enumerate(lives):
        sequence = _sequence(number, prompt, len(windows), its_salt)
        cache.admit(sequence, 0)
        kv.grow(sequence, len(prompt))
        sequence.computed = min(computed, len(prompt))
        cache.publish(sequence)
        for page in range(sequence.computed // SIZE):
            for contents in known:
                contents.add((its_salt, *prompt[: (page + 1) * SIZE]))
        cache.withdraw(sequence)
        cache.check(set())
        kv.release(sequence)
    for group, page in evictions:      # any page may be gone in any group
        pool = kv.pools[group % len(windows)]
        key = next((k for k, p in pool._page_of.items() if p == page), None)
        if key is None:
            continue
        owner = next(
            content for content in known[group % len(windows)]
            if cache._keys(_sequence(99, list(content[1:]), 1, content[0]), (len(content) - 1) // SIZE)[-1] == key
        )
        known[group % len(windows)].discard(owner)
        pool.hold(page)
        pool.taint(page)
        pool.release([page])
    newcomer = _sequence(100, asked, len(windows), salt)
    found = cache.find(newcomer)
    assert found is not None

    def usable(count: int) -> bool:
        return all(
            (salt, *asked[: (page + 1) * SIZE]) in known[group]
            for group, window in enumerate(windows)
            for page in range(count)
            if window is None or (page + 1) * SIZE > count * SIZE - window + 1
        )

    expected = max(count for count in range((len(asked) - 1) // SIZE + 1) if usable(count))
    assert {len(pages) for pages in found} == {expected}
    for group, window in enumerate(windows):
        for page, number in enumerate(found[group]):
            needed = window is None or (page + 1) * SIZE > expected * SIZE - window + 1
            assert (number != NO_PAGE) == needed
    kv.adopt(newcomer, found)
    newcomer.computed = newcomer.capacity
    kv.check([newcomer])


@pytest.mark.parametrize("waiter_class", [0, 1, 2])
def test_a_promise_makes_others_wait_but_never_one_of_better_class(waiter_class: int) -> None:
    kv = KvGroups(make_shape(pages=30).groups, page_size=SIZE)
    cache = PrefixCache(kv, is_enabled=True)
    prompt = [5] * 10
    owner = _sequence(0, prompt, 1, None, priority=1)
    cache.admit(owner, 0)
    kv.grow(owner, 10)
    waiter = _sequence(1, prompt, 1, None, priority=waiter_class)
    assert (cache.find(waiter) is None) == (waiter_class >= 1)
    owner.computed = 5
    cache.publish(owner)
    assert (cache.find(waiter) is None) == (waiter_class >= 1)     # page 1 is still on its way
    owner.computed = 9
    cache.publish(owner)
    found = cache.find(waiter)
    assert found is not None and len(found[0]) == 3
    cache.withdraw(owner)
    cache.check(set())


def test_a_disabled_cache_finds_and_promises_nothing() -> None:
    kv = KvGroups(make_shape(pages=30, windows=(None, 4)).groups, page_size=SIZE)
    cache = PrefixCache(kv, is_enabled=False)
    owner = _sequence(0, [5] * 10, 2, None)
    cache.admit(owner, 0)
    kv.grow(owner, 10)
    owner.computed = 10
    cache.publish(owner)
    assert cache.find(_sequence(1, [5] * 10, 2, None)) == [[], []]
    assert not owner.page_keys
