"""Random lives of the whole loop: whatever arrives, goes, fails or runs short, each sequence gets its own tokens.

The fake runner reads every history through the page tables, so equal tokens mean right pages, rows and feedback; it
also checks each plan and its budgets. The harness checks page, row and queue accounting after every turn.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from jaxserve.core.plan import StepLimits
from tests.engine_harness import Harness, make_harness, make_request
from tests.fakes import alone

LENGTH_MAX = 40
BASES = [tuple((17 * base + 7 * i * i + i) % 101 for i in range(LENGTH_MAX)) for base in range(3)]
WINDOWS = [(None,), (None,), (None, 6), (5,), (3, None, 9), (1, None)]


class LoopMachine(RuleBasedStateMachine):
    """Arrivals, aborts, failures and growing limits in any order."""

    harness: Harness

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        draw = data.draw
        self.is_pressed = draw(st.booleans())   # long outputs in a pool that hardly holds one: preemption
        self.may_fail = draw(st.sampled_from([False, False, True]))
        page_size = draw(st.sampled_from([1, 2, 4, 8]))
        windows = draw(st.sampled_from(WINDOWS))
        fit = -(-LENGTH_MAX // page_size) + 1
        loads = [1] if self.is_pressed else [1, 2, 3]
        self.chunked = draw(st.booleans())
        self.tokens_max = draw(st.sampled_from([3, 9, 32, 64])) if self.chunked else LENGTH_MAX
        self.prefix = draw(st.booleans())
        self.policy = draw(st.sampled_from(["fcfs", "priority"]))
        self.harness = make_harness(
            tokens_max=self.tokens_max,
            samples_max=draw(st.sampled_from([1, 2, 8])),
            prefix=self.prefix,
            overlap=draw(st.booleans()),
            chunked=self.chunked,
            policy=self.policy,
            pages=[fit * draw(st.sampled_from(loads)) + draw(st.integers(0, 3)) for _ in windows],
            windows=windows,
            page_size=page_size,
            rows=draw(st.sampled_from([4, 6] if self.is_pressed else [1, 2, 4, 6])),
            slots=draw(st.integers(1, 2)),
            length_max=LENGTH_MAX,
        )
        self.final = self.harness.runner.limits_now
        if draw(st.booleans()):
            self.harness.runner.limits_now = StepLimits(tokens_max=draw(st.integers(1, 3)), samples_max=1)
        self.corrupt_from: dict[int, int] = {}
        self.harness.runner.corrupts = lambda row, at: at >= self.corrupt_from.get(row.seed, LENGTH_MAX)
        self.failures: list[str] = []
        self.harness.runner.fail_launch = lambda plan: self._fails("launch")
        self.harness.runner.fail_result = lambda plan: self._fails("result")
        self.aborted: set[str] = set()
        self.has_passed_over = self.prefix

    def _fails(self, where: str) -> bool:
        if self.failures and self.failures[0] == where:
            self.failures.pop(0)
            return True
        return False

    @rule(
        base=st.integers(0, len(BASES) - 1),
        shared=st.sampled_from([0, 1, 3, 8, 9, 16, 30, LENGTH_MAX - 1]),
        own=st.sampled_from([0, 1, 2, 3, 5, 9, 20, LENGTH_MAX]),
        max_tokens=st.sampled_from([None, None, 1, 2, 7, 15]),
        choices=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(0, 2),
        min_tokens=st.sampled_from([0, 0, 1]),
        extra=st.sampled_from(["", "", "", "penalty", "scores", "salt", "logprobs", "ignore_eos", "corrupt"]),
        corrupt_after=st.integers(0, 5),
    )
    def add(
        self, base: int, shared: int, own: int, max_tokens: int | None, choices: int, priority: int, min_tokens: int,
        extra: str, corrupt_after: int,
    ) -> None:
        own = min(own, LENGTH_MAX - 1 - shared)
        first = len(self.harness.requests)
        prompt = BASES[base][:shared] + tuple((first * 31 + i * 13) % 101 for i in range(own)) or (1,)
        eos, stop_ids = (3, 14), (65,)
        if self.is_pressed:
            prompt, max_tokens, eos, stop_ids = prompt[:7], None, (), ()
        fields: dict[str, object] = {
            "": {}, "corrupt": {}, "penalty": {"presence_penalty": 0.5}, "scores": {"prompt_logprobs": 2},
            "salt": {"cache_salt": "s"}, "logprobs": {"logprobs": 1}, "ignore_eos": {"ignore_eos": True},
        }[extra]
        self.has_passed_over |= extra == "penalty"
        for choice in range(choices):
            seed = len(self.harness.requests)
            if extra == "corrupt":
                self.corrupt_from[seed] = len(prompt) - 1 + corrupt_after
            self.harness.add(make_request(
                f"{first}/{choice}", prompt, max_tokens=max_tokens, min_tokens=min_tokens, seed=seed, choice=choice,
                priority=priority, eos_token_ids=eos, stop_token_ids=stop_ids, **fields,
            ))

    @rule(turns=st.sampled_from([1, 1, 2, 5, 12]))
    def step(self, turns: int) -> None:
        self.harness.step(turns)

    @precondition(lambda self: self.harness.loop.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = [name for name in self.harness.requests if self.harness.end(name) is None and name not in self.aborted]
        if live:
            name = data.draw(st.sampled_from(live))
            self.aborted.add(name)
            self.harness.loop.abort([name, "unknown"])
            self.harness.loop.check()

    @rule()
    def compile_more(self) -> None:
        self.harness.runner.limits_now = self.final

    @precondition(lambda self: self.may_fail)
    @rule(where=st.sampled_from(["launch", "result"]))
    def run_out_of_memory(self, where: str) -> None:
        if len(self.failures) < 2:
            self.failures.append(where)

    @rule()
    def flush(self) -> None:
        self.harness.loop.flush_prefix_cache()
        self.harness.loop.check()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        harness = self.harness
        self.failures.clear()
        harness.runner.limits_now = self.final
        harness.run()
        for name, request in harness.requests.items():
            expected = alone(request, harness.runner.shape)
            tokens, end = harness.tokens(name), harness.end(name)
            assert expected.token_ids[: len(tokens)] == tokens, "a token that the sequence alone would not have"
            if name in self.aborted:
                assert end in ("abort", expected.finish_reason, "error")
            elif end == "error":
                error = harness.outputs[name][-1].error or ""
                if "NaN" in error:
                    assert len(tokens) == self.corrupt_from[request.seed] - len(request.prompt_token_ids) + 1
                else:
                    assert "ran out of memory 3 times" in error
            else:
                harness.assert_alone(name)
                scores = harness.outputs[name][0].prompt_logprobs
                if request.params.prompt_logprobs is not None:
                    assert scores is not None and scores[0] is None
                    assert tuple(s.logprob for s in scores[1:] if s) == expected.prompt_scores
        self._check_order()

    def _check_order(self) -> None:
        """Under fcfs nobody overtakes, unless it passes one that waits for a prefix or a slot."""
        if self.policy != "fcfs" or self.has_passed_over or not self.chunked:
            return
        taken = [outputs[-1].times.scheduled_s for outputs in self.harness.outputs.values()]
        taken = [scheduled_s for scheduled_s in taken if scheduled_s]
        assert taken == sorted(taken)


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.timeout(300)
def test_any_life_gives_each_sequence_its_own_tokens() -> None:
    run_state_machine_as_test(
        LoopMachine,
        settings=settings(
            max_examples=250, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=QUIET
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_life_at_length() -> None:
    run_state_machine_as_test(
        LoopMachine,
        settings=settings(max_examples=4000, stateful_step_count=60, deadline=None, suppress_health_check=QUIET),
    )
