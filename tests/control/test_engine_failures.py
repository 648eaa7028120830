"""Non-finite logits and allocation failures: the guilty end with a reason, everybody else gets the right tokens."""

import pytest

from jaxserve.core.plan import StepPlan
from tests.engine_harness import make_harness, make_request
from tests.fakes import alone


@pytest.mark.parametrize("overlap", [True, False])
def test_a_non_finite_sequence_ends_alone_and_its_pages_are_cleared(overlap: bool) -> None:
    harness = make_harness(overlap=overlap, pages=24)
    harness.runner.corrupts = lambda row, position: row.seed == 1 and position >= 12
    shared = list(range(1, 10))
    harness.add(
        make_request("good", shared, seed=0, max_tokens=30, eos_token_ids=()),
        make_request("bad", shared, seed=1, max_tokens=30, eos_token_ids=()),
        make_request("twin", shared, seed=2, max_tokens=30, eos_token_ids=()),
    )
    harness.run().assert_alone("good", "twin")
    last = harness.outputs["bad"][-1]
    assert last.finish_reason == "error" and "NaN or infinite" in (last.error or "")
    assert harness.tokens("bad") == alone(harness.requests["bad"], harness.runner.shape).token_ids[:4]
    assert harness.loop.stats.corrupted_count == 1
    assert {page for _, page in harness.runner.cleared}
    # Every page is used once more; a stale non-finite slot anywhere would end its reader.
    harness.add(*(make_request(f"n{n}", [n + 20] * 30, seed=9, max_tokens=40) for n in range(3)))
    harness.run().assert_alone("n0", "n1", "n2")


def test_pages_of_a_non_finite_sequence_are_never_found_again() -> None:
    harness = make_harness()
    harness.runner.corrupts = lambda row, position: row.seed == 1 and position >= 20
    harness.add(make_request("bad", 20, seed=1, max_tokens=10, eos_token_ids=()))
    harness.run()
    harness.add(make_request("same", 20, seed=0))
    harness.run().assert_alone("same")
    assert harness.outputs["same"][0].cached_token_count == 0


@pytest.mark.parametrize("where", ["fail_launch", "fail_result"])
@pytest.mark.parametrize("overlap", [True, False])
def test_an_allocation_failure_costs_time_and_no_token(where: str, overlap: bool) -> None:
    harness = make_harness(overlap=overlap)
    setattr(harness.runner, where, lambda plan: plan.step in (3, 6))
    harness.add(*(make_request(str(n), 9 + n, seed=n, max_tokens=12) for n in range(5)))
    harness.step(3)
    harness.run().assert_alone()
    assert harness.runner.rebuild_count == 2
    assert [o.finish_reason for o in harness.outputs["0"]].count("length") == 1


def test_an_allocation_failure_flushes_the_prefix_cache() -> None:
    harness = make_harness()
    harness.add(make_request("a", 20))
    harness.run()
    harness.runner.fail_launch = lambda plan: len(plan.admissions) == 1 and not harness.runner.rebuild_count
    harness.add(make_request("b", 20, seed=1))
    harness.run().assert_alone()
    assert [int(plan.start_A[0]) for plan in harness.runner.plans if plan.admissions] == [0, 16, 0]


def test_a_sequence_that_fails_alone_again_and_again_ends_with_an_error() -> None:
    harness = make_harness()

    def holds_culprit(plan: StepPlan) -> bool:
        culprit.update({a.row: a.seed == 7 for a in plan.admissions})
        return any(culprit[row] for row in plan.row_A.tolist())

    culprit: dict[int, bool] = {}
    harness.runner.fail_result = holds_culprit
    harness.add(*(make_request(str(n), 6, seed=n, max_tokens=6) for n in range(6, 10)))
    harness.run().assert_alone("6", "8", "9")
    assert harness.end("7") == "error" and "ran out of memory 3 times" in (harness.outputs["7"][-1].error or "")


def test_steps_that_only_fail_when_mixed_are_computed_one_sequence_at_a_time() -> None:
    harness = make_harness()
    harness.runner.fail_launch = lambda plan: plan.row_A.shape[0] > 1
    harness.add(*(make_request(str(n), 6, seed=n, max_tokens=20) for n in range(4)))
    harness.run().assert_alone()
    assert harness.runner.rebuild_count < 8


def test_an_abort_between_failure_and_recovery_is_an_abort() -> None:
    harness = make_harness()
    harness.runner.fail_result = lambda plan: plan.step == 2
    harness.add(make_request("a", 6, max_tokens=20), make_request("b", 6, seed=1, max_tokens=20))
    harness.step(2)
    harness.loop.abort(["a"])
    harness.run().assert_alone("b")
    assert harness.end("a") == "abort"
