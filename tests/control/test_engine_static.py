"""Static batching: a batch is who waits when nothing runs, and the next begins when all of it have ended."""

import pytest

from tests.engine_harness import Harness, make_harness, make_request


def first_turns(harness: Harness) -> dict[str, int]:
    """Runs to the end; the turn in which each request gave its first token."""
    turns: dict[str, int] = {}
    turn = 0
    while harness.loop.has_work:
        turn += 1
        for output in harness.step():
            turns.setdefault(output.request_id, turn)
    return turns


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_joins_until_the_whole_batch_has_ended(overlap: bool, policy: str) -> None:
    harness = make_harness(batching="static", rows=2, overlap=overlap, policy=policy, prefix=False)
    harness.add(make_request("short", 5, max_tokens=2), make_request("long", 5, max_tokens=12, seed=1))
    harness.add(make_request("next", 5, max_tokens=2, seed=2))
    turns = first_turns(harness)
    harness.assert_alone()
    assert turns["next"] > turns["long"] + 10


def test_a_free_row_stays_free_for_those_who_came_after_the_batch_began() -> None:
    harness = make_harness(batching="static", rows=4, prefix=False)
    harness.add(make_request("a", 5, max_tokens=8))
    harness.step(2)
    harness.add(make_request("b", 5, max_tokens=8, seed=1))
    harness.step(3)
    assert harness.loop.stats.running_count == 1 and harness.loop.stats.waiting_count == 1
    harness.run().assert_alone()


def test_a_batch_larger_than_a_step_is_still_one_batch() -> None:
    harness = make_harness(batching="static", rows=4, tokens_max=8, prefix=False)
    harness.add(*(make_request(name, 8, max_tokens=12, seed=seed) for seed, name in enumerate("abcd")))
    turns = first_turns(harness)
    harness.assert_alone()
    assert max(turns.values()) < turns["a"] + 11, "all of the batch run at once"


def test_the_preempted_rejoin_their_own_batch_and_equal_prompts_do_not_lock_it() -> None:
    harness = make_harness(batching="static", rows=4, pages=12)
    harness.add(*(make_request(name, 8, max_tokens=14, seed=seed) for seed, name in enumerate("abcdef")))
    harness.run().assert_alone()
    assert harness.loop.stats.preemption_count > 0


def test_an_aborted_batch_makes_way() -> None:
    harness = make_harness(batching="static", rows=1)
    harness.add(make_request("a", 5, max_tokens=50), make_request("b", 5, max_tokens=3, seed=1))
    harness.step(3)
    harness.loop.abort(["a"])
    harness.run()
    harness.assert_alone("b")
