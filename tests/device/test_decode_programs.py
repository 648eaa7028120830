"""Programs without prefill for steps of decodes only: who has them, which steps get them, and that nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.core.config import CompilationConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.core.progress import NoProgress
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.layers import paged
from jaxserve.models.registry import read_spec
from jaxserve.plan.devices import kind
from jaxserve.plan.sizes import Sizer
from jaxserve.runner import start
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.draft_model import DraftModel
from jaxserve.runner.programs import ProgramSet
from jaxserve.runner.runner import Runner
from tests.device.plans import Driver, Entry, complete
from tests.device.tiny import continuation, prompt_of, tiny_config, tiny_params, tiny_setup, tiny_spec

SPEC = tiny_spec(is_tied=True)
SMALL, LARGE = 8, 32
LIKELY = SamplingParams(temperature=0, logprobs=5)
# reset, admit, admit_slot, clear; forward (begin, layers, finish) and score by T; sample; layers without prefill
PROGRAMS = 4 + (3 + 1) * 2 + 1 + 1


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny_params(SPEC)


@pytest.fixture(scope="module")
def setup(params: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    plain = tiny_setup(SPEC, params, tiny_config(store=tmp_path_factory.mktemp("store")))
    buckets = Buckets(tokens=(SMALL, LARGE), rows=(8,))
    return replace(plain, buckets=buckets, samples_max=8, decodes_apart=True)


@pytest.fixture(scope="module")
def runner(setup: Any, params: Any) -> Any:
    runner = Runner.create(setup=setup, params=params)
    runner.compile_serving_set(NoProgress())
    assert not runner._builder.decode_forward and complete(runner, prompt_of(5, 1), 3), "it serves without them"
    runner.compile_rest(NoProgress())
    assert runner.wait_ready(240)
    yield runner
    runner.close()


@pytest.fixture
def taken(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Token buckets of the steps that ran without prefill, in order."""
    runner.rebuild()
    buckets: list[int] = []

    def counted(size: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            buckets.append(size)
            return forward(*arguments)

        return call

    found = runner._builder.decode_forward
    monkeypatch.setattr(runner._builder, "decode_forward", {size: counted(size, of) for size, of in found.items()})
    return buckets


def test_they_are_few_and_compiled_before_ready(runner: Runner) -> None:
    """Only for buckets that a decode of every row may need; begin and finish are those of the bucket."""
    built = runner._builder
    assert sorted(built.decode_forward) == [SMALL] == list(runner._setup.decode_tokens)
    assert runner.stats.compiled_count == PROGRAMS == len(runner.executables())
    assert runner.stats.compiled_after_ready_count == 0
    without, whole = built.decode_forward[SMALL], built.forward[SMALL]
    assert without.begin is whole.begin and without.finish is whole.finish
    assert runner.temporary_bytes >= max(map(start.temporary_bytes, without.run_layers))


def test_decodes_get_the_same_bits_with_them_and_without(
    runner: Runner, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, logprobs, and every page that was written, in steps of one row to seven."""
    lengths = {5: 9, 2: 21, 0: 3, 7: 1, 1: 30, 3: 2, 6: 5}

    def life() -> list[np.ndarray]:
        runner.rebuild()
        driver, found = Driver(runner, seed=4), []
        for row, length in lengths.items():
            driver.admit(row, prompt_of(length, row), LIKELY)
            driver.run(Entry(row, prompt_of(length, row)))
        for rows in [(5, 2, 0), (0, 1, 2, 3, 5, 6, 7), (7,), (2, 0, 5, 1)]:
            result = driver.run(*map(Entry, rows))
            found += [result.token_A, *(getattr(result.logprobs, name) for name in ("logprob_A", "top_logprob_AX"))]
        return [np.asarray(array) for array in (*found, *jax.tree.leaves(runner._state.kv))]

    without = life()
    assert taken == [SMALL] * 5, "a prompt of one token is planned as a decode here"
    monkeypatch.setattr(runner._builder, "decode_forward", {})
    for ours, theirs in zip(without, life(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert runner.stats.compiled_after_ready_count == 0


def test_a_step_with_a_prompt_or_a_draft_never_gets_one(runner: Runner, params: Any, taken: list[int]) -> None:
    prompt, other = prompt_of(6, 2), prompt_of(5, 3)
    expected = continuation(SPEC, params, prompt, 5)
    driver = Driver(runner)
    driver.admit(0, prompt)
    driver.admit(1, other)
    tokens = [int(driver.run(Entry(0, prompt)).token_A[0])]
    tokens.append(int(driver.run(Entry(0), Entry(1, other[:2], samples=False)).token_A[0]))
    verified = replace(driver.plan(Entry(0, expected[1:3])), draft_A=np.array([1], np.int32))
    result = runner.launch(verified).result()
    assert result.token_N is not None and [*tokens, *result.token_N] == expected[:4] and not taken
    assert driver.run(Entry(0)).token_A[0] == expected[4] and taken == [SMALL]


def test_a_step_of_nothing_is_no_step_of_decodes(runner: Runner, taken: list[int]) -> None:
    """What a start runs once is the program that everybody needs."""
    runner._run_once()
    assert not taken


def test_they_have_no_prefill_and_neither_has_drafting(
    setup: Any, params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "paged_prefill", _raising)
    programs = ProgramSet(setup, params)
    drafting = DraftModel(setup, SPEC, params, tokens_max=2)
    for program in (*programs.decode_layers(SMALL), drafting.write_program(SMALL)):
        jax.eval_shape(program.function, *program.arguments)
    for program in (programs.forward(SMALL)[1], drafting.follow_program(SMALL)):
        with pytest.raises(NotImplementedError, match="prefill"):
            jax.eval_shape(program.function, *program.arguments)


def _raising(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("prefill")


def test_several_processes_have_all_of_them_before_they_meet(setup: Any, params: Any) -> None:
    """Which program a step gets is asked of a process's own programs: processes of one step must not differ in them."""
    runner, seen = Runner.create(setup=setup, params=params), []
    runner.compile_serving_set(NoProgress(), meet=lambda: seen.append(tuple(sorted(runner._builder.decode_forward))))
    assert seen == [setup.decode_tokens] and runner.is_ready
    runner.close()


@pytest.mark.parametrize(("device", "is_eager", "count"), [("H200", False, 3), ("H200", True, 0), ("CPU", False, 0)])
def test_only_gpus_have_them_and_none_that_wants_few_programs(device: str, is_eager: bool, count: int) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "tiny-qwen2"
    config = EngineConfig(
        model=ModelConfig(model="m", dtype="bfloat16"),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=2048),
        compilation=CompilationConfig(enforce_eager=is_eager),
    )
    setup = Sizer(spec=read_spec(folder), folder=folder).size(config, kind(device), lambda *_: 0).setup
    assert len(setup.decode_tokens) == count and set(setup.decode_tokens) <= set(setup.buckets.tokens)
    assert not count or setup.decode_tokens[-2] < 64 <= setup.decode_tokens[-1]
