"""The loop's semantics, one a test: overlap, ends, rows, pages, prefix waiting, policies, queue bounds."""

import pytest

from jaxserve.core.errors import EngineBusyError, RequestError
from jaxserve.core.plan import StepLimits
from tests.engine_harness import make_harness, make_request
from tests.fakes import alone

NO_END = {"eos_token_ids": (), "max_tokens": None}


def test_plan_is_made_before_the_tokens_of_the_step_in_flight_are_known() -> None:
    harness = make_harness()
    harness.add(make_request("a", 5, max_tokens=4))
    assert harness.step() == []                      # the first turn only launches
    assert [len(o.token_ids) for o in harness.step()] == [1]
    harness.run().assert_alone()
    prefill, *decodes = harness.runner.plans
    assert prefill.decode_count == 0 and prefill.count_A.tolist() == [5] and not prefill.from_row_A[0]
    assert len(decodes) == 3 and all(plan.decode_count == 1 and plan.from_row_A.all() for plan in decodes)
    assert [plan.is_all_decodes for plan in harness.runner.plans] == [False, True, True, True]
    assert [int(plan.start_A[0]) for plan in decodes] == [5, 6, 7]


def test_without_overlap_each_turn_launches_and_commits_with_tokens_from_the_host() -> None:
    harness = make_harness(overlap=False)
    harness.add(make_request("a", 5, max_tokens=4))
    for _ in range(4):
        assert [len(o.token_ids) for o in harness.step()] == [1]
    assert not harness.loop.has_work
    assert not any(plan.from_row_A.any() for plan in harness.runner.plans)
    harness.assert_alone()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_known_length_costs_no_discarded_token(overlap: bool) -> None:
    harness = make_harness(overlap=overlap, length_max=12)
    harness.add(make_request("by max_tokens", 5, max_tokens=3), make_request("by length", 5, max_tokens=None, seed=1))
    harness.run().assert_alone()
    samples = sum(plan.sample_count for plan in harness.runner.plans)
    assert samples == 3 + 7 == harness.loop.stats.generation_tokens


def test_an_end_by_token_costs_one_discarded_token_that_nobody_sees() -> None:
    shape = make_harness().runner.shape
    request = make_request("a", 5, max_tokens=20)
    eos = alone(request, shape).token_ids[3]
    harness = make_harness()
    harness.add(make_request("a", 5, max_tokens=20, eos_token_ids=(eos,)))
    harness.run().assert_alone()
    assert harness.end("a") == "stop" and len(harness.tokens("a")) <= 4
    assert sum(plan.sample_count for plan in harness.runner.plans) == len(harness.tokens("a")) + 1


def test_pages_go_back_when_no_step_in_flight_writes_them() -> None:
    harness = make_harness(prefix=False)
    harness.add(make_request("a", 8, max_tokens=20))
    harness.step(3)
    used = harness.loop.stats.page_used_count
    harness.loop.abort(["a"])
    assert harness.loop.stats.page_used_count == used   # step 3 is in flight and writes into them
    assert [o.finish_reason for o in harness.step()] == ["abort"]
    assert harness.loop.stats.page_used_count == 0 and not harness.loop.has_work


def test_a_row_is_taken_again_while_its_last_owner_is_still_in_flight() -> None:
    eos = alone(make_request("a", 5, max_tokens=20), make_harness().runner.shape).token_ids[2]
    harness = make_harness(rows=1)
    harness.add(make_request("a", 5, max_tokens=20, eos_token_ids=(eos,)), make_request("b", [9, 9, 9], seed=3))
    harness.run().assert_alone()
    steps = [(plan.step, len(plan.admissions)) for plan in harness.runner.plans]
    assert [step for step, admissions in steps if admissions] == [1, len(harness.tokens("a")) + 2]


def test_a_sequence_preempted_in_flight_gets_its_token_and_is_planned_only_afterwards() -> None:
    harness = make_harness(pages=10, rows=2, length_max=40, prefix=False)
    harness.add(make_request("old", 4, **NO_END), make_request("new", [7] * 4, seed=1, **NO_END))
    while not harness.loop.stats.preemption_count:
        harness.step()
    before = len(harness.outputs["new"])
    plans = len(harness.runner.plans)
    harness.run().assert_alone()
    # With overlap the token in flight came out in the very turn of the preemption: outputs have no gap.
    assert before == len([o for o in harness.outputs["new"] if not o.preemption_count]) + 1
    resumed = next(plan for plan in harness.runner.plans[plans:] if plan.admissions)
    assert resumed.admissions[0].token_ids.shape[0] == 4 + before
    assert harness.outputs["old"][-1].preemption_count == 0


def test_a_victim_that_was_chosen_already_leaves_the_plan_with_its_new_page() -> None:
    harness = make_harness(page_size=1, pages=30, tokens_max=4, rows=2, prefix=False, length_max=30, policy="priority")
    harness.add(make_request("worse", [7], seed=1, priority=1, **NO_END))
    harness.step(2)
    harness.add(make_request("better", 24, max_tokens=4))
    harness.run().assert_alone()
    assert harness.outputs["worse"][-1].preemption_count and not harness.outputs["better"][-1].preemption_count


def test_one_victim_a_turn_while_its_pages_are_on_the_way() -> None:
    harness = make_harness(pages=15, rows=4, length_max=60, prefix=False)
    harness.add(*(make_request(str(n), [n + 1] * 4, seed=n, **NO_END) for n in range(4)))
    while not harness.loop.stats.preemption_count:
        harness.step()
    assert harness.loop.stats.preemption_count == 1      # all four needed a page in that very turn
    harness.run().assert_alone()


def test_what_a_preempted_sequence_had_computed_is_found_again_in_the_cache() -> None:
    harness = make_harness(pages=14, rows=2, length_max=40)
    harness.add(make_request("old", 4, **NO_END), make_request("new", [7] * 4, seed=1, **NO_END))
    harness.run().assert_alone()
    assert harness.loop.stats.preemption_count
    resumed = [plan.start_A[-1] for plan in harness.runner.plans if plan.admissions][1:]
    assert max(resumed) > 0


def test_choices_of_one_prompt_cost_one_prefill() -> None:
    harness = make_harness(page_size=4)
    harness.add(*(make_request(f"a/{n}", 21, choice=n, temperature=1.0, max_tokens=4) for n in range(4)))
    harness.run().assert_alone()
    computed = sum(int(plan.count_A[plan.decode_count:].sum()) for plan in harness.runner.plans)
    assert computed == 21 + 3 * 1        # all but the last token of each other choice is shared
    stats = harness.loop.stats
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (84, 60)
    assert [harness.outputs[f"a/{n}"][0].cached_token_count for n in range(4)] == [0, 20, 20, 20]


def test_choices_without_prefix_cache_just_compute() -> None:
    harness = make_harness(prefix=False)
    harness.add(*(make_request(f"a/{n}", 21, choice=n) for n in range(3)))
    harness.run().assert_alone()
    assert sum(int(plan.count_A[plan.decode_count:].sum()) for plan in harness.runner.plans) == 63
    assert harness.loop.stats.prefix_query_tokens == 0


def test_waiting_for_a_prefix_does_not_hold_back_others_and_ends_with_its_owner() -> None:
    harness = make_harness(tokens_max=8)
    harness.add(make_request("owner", 40), make_request("waits", 41), make_request("other", [5, 6, 7]))
    harness.step()
    assert harness.loop.stats.running_count == 1     # the owner takes the whole first step
    harness.step(4)
    harness.loop.abort(["owner"])
    harness.run().assert_alone("waits", "other")
    assert harness.outputs["waits"][0].cached_token_count >= 32   # what the owner had computed is used


def test_a_full_hit_still_computes_its_last_token() -> None:
    harness = make_harness()
    harness.add(make_request("a", 16))
    harness.run()
    harness.add(make_request("b", 16, seed=5))
    harness.run().assert_alone()
    assert harness.outputs["b"][0].cached_token_count == 12


def test_salts_part_the_cache_and_a_flush_empties_it() -> None:
    harness = make_harness()
    for name, salt in (("a", None), ("b", "x"), ("c", ""), ("d", "x")):
        harness.add(make_request(name, 17, cache_salt=salt))
        harness.run()
    assert [harness.outputs[name][0].cached_token_count for name in "abcd"] == [0, 0, 0, 16]
    harness.loop.flush_prefix_cache()
    harness.add(make_request("e", 17))
    harness.run().assert_alone()
    assert harness.outputs["e"][0].cached_token_count == 0


def test_steps_mix_decodes_with_chunks_under_the_token_budget() -> None:
    harness = make_harness(tokens_max=8, prefix=False)
    harness.add(make_request("a", 3, max_tokens=20), make_request("b", 30, seed=1))
    harness.run().assert_alone()
    mixed = [plan for plan in harness.runner.plans if 0 < plan.decode_count < plan.row_A.shape[0]]
    assert mixed and all(plan.token_count == 8 for plan in mixed[:3])


def test_more_decodes_than_sampling_rows_take_turns_until_all_are_done() -> None:
    harness = make_harness(samples_max=2)
    harness.add(*(make_request(str(n), [n + 1], max_tokens=6) for n in range(6)))
    harness.run().assert_alone()


def test_fcfs_does_not_let_small_requests_overtake_a_big_one_for_ever() -> None:
    harness = make_harness(pages=20, prefix=False, length_max=80, tokens_max=128)
    harness.add(*(make_request(f"s{n}", [n + 1] * 8, max_tokens=8) for n in range(4)))
    harness.step(2)
    harness.add(make_request("big", 70, max_tokens=2))
    for n in range(40):      # an unending stream of small ones, each of which would fit at once
        harness.add(make_request(f"t{n}", [n + 1] * 4, max_tokens=2))
        harness.step()
        if harness.end("big"):
            break
    assert harness.end("big") == "length"
    harness.run().assert_alone()
    taken = {name: outputs[-1].times.scheduled_s for name, outputs in harness.outputs.items()}
    assert taken["big"] <= min(taken_s for name, taken_s in taken.items() if name.startswith("t"))


def test_priority_goes_first_and_is_preempted_last() -> None:
    harness = make_harness(policy="priority", rows=2, pages=10, length_max=40, prefix=False)
    harness.add(make_request("low", [1] * 4, priority=5, **NO_END), make_request("mid", [2] * 4, priority=1, **NO_END))
    harness.step()
    harness.add(make_request("last", [4] * 4, priority=9), make_request("high", [3] * 4, priority=-1, **NO_END))
    harness.run().assert_alone()
    preempted = {name: outputs[-1].preemption_count for name, outputs in harness.outputs.items()}
    assert preempted["low"] > 0 and preempted["high"] == 0
    taken = {name: outputs[-1].times.scheduled_s for name, outputs in harness.outputs.items()}
    assert taken["high"] < taken["last"]


def test_fcfs_ignores_priority() -> None:
    harness = make_harness(rows=1)
    harness.add(make_request("a", 3, priority=5), make_request("b", 3, priority=0))
    harness.run()
    assert harness.outputs["a"][-1].times.last_token_s < harness.outputs["b"][0].times.first_token_s


def test_a_sequence_waits_for_a_shaping_slot_while_others_run() -> None:
    harness = make_harness(slots=1)
    harness.add(*(make_request(f"p{n}", 3, presence_penalty=1.0, seed=n) for n in range(3)), make_request("free", 3))
    harness.step()
    assert harness.loop.stats.running_count == 2
    harness.run().assert_alone()
    slots = [a.slot for plan in harness.runner.plans for a in plan.admissions]
    assert sorted(slots) == [-1, 0, 0, 0]


def test_without_chunked_prefill_a_prompt_is_computed_whole() -> None:
    harness = make_harness(chunked=False, tokens_max=32, prefix=False)
    harness.add(make_request("a", 20), make_request("b", 20, seed=1), make_request("c", 12, seed=2))
    harness.run().assert_alone()
    chunks = [count for plan in harness.runner.plans for count in plan.count_A[plan.decode_count:].tolist()]
    assert sorted(chunks) == [12, 20, 20]


def test_without_chunked_prefill_small_buckets_are_waited_for() -> None:
    harness = make_harness(chunked=False, tokens_max=32)
    harness.runner.limits_now = StepLimits(tokens_max=8, samples_max=4)
    harness.add(make_request("long", 20), make_request("short", 4, seed=1))
    harness.step(20)
    assert harness.end("short") and not harness.outputs["long"] and harness.loop.is_stalled
    harness.runner.limits_now = StepLimits(tokens_max=32, samples_max=4)
    harness.run().assert_alone()
    assert not harness.loop.is_stalled


def test_limits_are_read_for_every_plan() -> None:
    harness = make_harness(tokens_max=64)
    harness.runner.limits_now = StepLimits(tokens_max=4, samples_max=1)
    harness.add(make_request("a", 50, max_tokens=2))
    harness.step()
    harness.runner.limits_now = StepLimits(tokens_max=64, samples_max=8)
    harness.run().assert_alone()
    assert [plan.token_count for plan in harness.runner.plans] == [4, 46, 1]


def test_a_full_queue_refuses_with_busy() -> None:
    harness = make_harness(rows=2, queue_max=1)
    harness.add(*(make_request(str(n), 4, seed=n) for n in range(3)))     # two free rows, one may wait
    with pytest.raises(EngineBusyError, match="max-num-queued-reqs"):
        harness.loop.add(make_request("too many", 4))
    harness.step()
    with pytest.raises(EngineBusyError):
        harness.loop.add(make_request("too many", 4))
    harness.run().assert_alone()


def test_max_num_seqs_bounds_the_rows_in_use() -> None:
    harness = make_harness(rows=8, max_num_seqs=2)
    harness.add(*(make_request(str(n), 4, seed=n) for n in range(5)))
    harness.run().assert_alone()
    assert max(plan.row_A.shape[0] for plan in harness.runner.plans) == 2


def test_abort_of_waiting_running_unknown_and_ended_sequences() -> None:
    harness = make_harness(rows=1)
    harness.add(make_request("runs", 4, max_tokens=30), make_request("waits", 4, seed=1), make_request("c", 4, seed=2))
    harness.step(3)
    harness.loop.abort(["runs", "waits", "unknown", "runs"])
    harness.run().assert_alone("c")
    assert harness.end("runs") == harness.end("waits") == "abort"
    assert harness.outputs["waits"][0].times.scheduled_s == 0
    harness.loop.abort(["c"])
    assert not harness.loop.has_work


def test_a_live_id_is_refused_and_an_ended_one_may_come_again() -> None:
    harness = make_harness()
    harness.add(make_request("a", 4))
    with pytest.raises(RequestError, match="'a' is running already"):
        harness.loop.add(make_request("a", 4))
    harness.run()
    harness.add(make_request("a", 4))
    harness.run().assert_alone()


def test_times_and_stats() -> None:
    harness = make_harness()
    harness.add(make_request("a", 10, max_tokens=3, arrival_s=99.5))
    outputs = harness.run().outputs["a"]
    times = outputs[-1].times
    assert (times.arrival_s, times.scheduled_s, times.first_token_s, times.last_token_s) == (99.5, 100.5, 101.0, 102.0)
    stats = harness.loop.stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.step_count) == (10, 3, 3)
    assert (stats.running_count, stats.waiting_count, stats.page_used_count, stats.page_count) == (0, 0, 0, 64)
    timing = harness.loop.last_timing
    assert timing.plan_s >= 0 and timing.commit_s > 0
    harness.loop.close()
    assert harness.runner.is_closed


@pytest.mark.parametrize("windows", [(6,), (None, 6), (1, None, 9)])
def test_pages_that_slid_out_of_every_window_are_given_back(windows: tuple[int | None, ...]) -> None:
    pages = [40 if window is None else 6 for window in windows]
    harness = make_harness(windows=windows, pages=pages, length_max=120, tokens_max=8)
    harness.add(make_request("a", 50, max_tokens=60, eos_token_ids=()))
    harness.run().assert_alone()
    harness.add(make_request("again", 50, max_tokens=5), make_request("b", 90, seed=4))
    harness.run().assert_alone()


def test_a_windowed_prefix_is_reused_where_its_last_window_is_cached() -> None:
    harness = make_harness(windows=(None, 6), pages=[40, 40], tokens_max=64)
    harness.add(make_request("a", 41, max_tokens=1))
    harness.run()
    harness.add(make_request("b", 41, seed=1))
    harness.run().assert_alone()
    assert harness.outputs["b"][0].cached_token_count == 40
    admission = harness.runner.plans[1].admissions[0]
    assert (admission.pages[0] >= 0).all() and admission.pages[1].tolist()[:8] == [-1] * 8   # 40 - 6 + 1 = 35: page 8
    assert (admission.pages[1][8:] >= 0).all()
