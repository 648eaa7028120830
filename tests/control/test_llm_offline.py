"""The offline LLM on a real engine loop over the fake runner: results, order, limits, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxserve.core.config import EngineConfig, ModelConfig, SchedulerConfig
from jaxserve.core.errors import RequestError
from jaxserve.core.request import EngineInfo, EngineStats
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.llm import LLM
from jaxserve.outputs import RequestOutput
from tests.engine_harness import make_harness, make_request
from tests.fakes import alone
from tests.text_fixtures import CHATML, byte_level

VOCAB = byte_level().get_vocab_size()


@dataclass
class FakeLocalEngine:
    """What `LLM` needs of a built engine."""

    loop: EngineLoop
    info: EngineInfo
    folder: Path
    is_closed: bool = False
    compiles: int = 0

    @property
    def stats(self) -> EngineStats:
        return self.loop.stats

    def compile_rest(self) -> None:
        self.compiles += 1

    def close(self) -> None:
        self.is_closed = True
        self.loop.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3, "temperature": 0}')
    return tmp_path


def make_llm(folder: Path, *, queue_max: int | None = None, skip_tokenizer: bool = False, **shape: object) -> LLM:
    harness = make_harness(pages=256, length_max=128, vocab_size=VOCAB, queue_max=queue_max, **shape)  # type: ignore[arg-type]
    info = EngineInfo(
        model="m", vocab_size=VOCAB, max_model_len=128, page_size=4, page_count=256, dtype="float32", row_count=8
    )
    config = EngineConfig(
        model=ModelConfig(model="m", skip_tokenizer_init=skip_tokenizer),
        scheduler=SchedulerConfig(max_num_queued_reqs=queue_max),
    )
    return LLM.from_engine(FakeLocalEngine(harness.loop, info, folder), config)  # type: ignore[arg-type]


def assert_idle(llm: LLM) -> None:
    assert llm._engine is not None
    assert not llm._engine.loop.has_work
    assert llm.get_metrics().page_used_count == 0


def expected_ids(result: RequestOutput, llm: LLM, **params: object) -> list[int]:
    """What the fake model gives to this prompt alone."""
    request = make_request("x", result.prompt_token_ids, temperature=0, **params)
    return list(alone(request, llm._engine.loop._runner.shape).token_ids)  # type: ignore[union-attr]


def test_generate_takes_every_shape_of_prompt(folder: Path) -> None:
    with make_llm(folder) as llm:
        ids = llm.get_tokenizer().encode("hello")
        greedy = SamplingParams(temperature=0, max_tokens=6, seed=0)
        for prompts in (
            "hello",
            ids,
            ["hello"],
            [ids],
            {"prompt": "hello"},
            [{"prompt_token_ids": ids, "cache_salt": "s"}],
        ):
            [result] = llm.generate(prompts, greedy, use_tqdm=False)  # type: ignore[arg-type]
            assert result.prompt_token_ids == ids
            [choice] = result.outputs
            assert choice.token_ids == expected_ids(result, llm, max_tokens=6)
            assert choice.text == llm.get_tokenizer().decode(choice.token_ids)
            assert (choice.index, choice.finish_reason, result.finished) == (0, "length", True)
        assert llm.generate("hello", greedy)[0].prompt == "hello"
        assert llm.generate([], greedy) == []
        assert_idle(llm)


def test_many_prompts_come_back_in_order_and_wait_outside_the_engine(folder: Path) -> None:
    with make_llm(folder, queue_max=2) as llm:
        prompts = [[1 + i % 250, 2, 3] for i in range(70)]
        params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, seed=0) for i in range(70)]
        results = llm.generate(prompts, params, use_tqdm=False)
        assert [result.prompt_token_ids for result in results] == prompts
        for i, result in enumerate(results):
            assert result.outputs[0].token_ids == expected_ids(result, llm, max_tokens=1 + i % 5)
        assert_idle(llm)


def test_choices_and_logprobs(folder: Path) -> None:
    with make_llm(folder) as llm:
        params = SamplingParams(n=3, max_tokens=4, seed=7, logprobs=2)
        [result] = llm.generate("hello", params, use_tqdm=False)
        assert [choice.index for choice in result.outputs] == [0, 1, 2]
        assert len({tuple(choice.token_ids) for choice in result.outputs}) > 1
        for choice in result.outputs:
            assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids) == 4
            for token_id, candidates in zip(choice.token_ids, choice.logprobs, strict=True):
                assert next(iter(candidates)) == token_id and 2 <= len(candidates) <= 3
                assert candidates[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
            sampled = [next(iter(candidates.values())).logprob for candidates in choice.logprobs]
            assert choice.cumulative_logprob == pytest.approx(sum(sampled))
        assert result.metrics is not None and result.metrics.last_token_time >= result.metrics.first_token_time
        plain = llm.generate("hello", SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0]
        assert plain.logprobs is None and plain.cumulative_logprob is None


def test_default_parameters_are_the_models(folder: Path) -> None:
    with make_llm(folder) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
        assert len(llm.generate("hello", use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_a_stop_string_frees_the_engine(folder: Path) -> None:
    with make_llm(folder) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=40, seed=0)
        text = llm.generate("hello", greedy, use_tqdm=False)[0].outputs[0].text
        stop = next(char for char in text[3:] if char.isalnum() and char not in text[:3])
        [result] = llm.generate("hello", greedy.with_(stop=(stop,)), use_tqdm=False)
        choice = result.outputs[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[: text.index(stop)], "stop", stop)
        assert_idle(llm)
        assert llm.get_metrics().generation_tokens < 40 + len(choice.token_ids) + 3, "it ran on after the stop string"


def test_chat(folder: Path) -> None:
    with make_llm(folder) as llm:
        one, two = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "he"}]
        results = llm.chat([one, two], SamplingParams(max_tokens=2), use_tqdm=False)
        assert [result.prompt for result in results] == [
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("hello", "he")
        ]
        [single] = llm.chat(
            one,
            SamplingParams(max_tokens=2),
            use_tqdm=False,
            chat_template="{{ messages[0].content }}{{ x }}",
            chat_template_kwargs={"x": "!"},
            add_generation_prompt=False,
        )
        assert single.prompt == "hello!"


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["hello", [1] * 128], None, "max_tokens must be at least 1"),
        (["hello", [VOCAB]], None, f"Token id {VOCAB} is out of vocabulary"),
        (["hello"], [SamplingParams(), SamplingParams()], "got 2 for 1 prompts"),
        ([{"text": "hello"}], None, "unknown key 'text'"),
        ([{"prompt": "a", "prompt_token_ids": [1], "x": 1}], None, "unknown key 'x'"),
    ],
)
def test_a_request_at_fault_stops_all_before_work(
    folder: Path, prompts: object, params: list[SamplingParams] | None, message: str
) -> None:
    with make_llm(folder) as llm:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, params or SamplingParams(), use_tqdm=False)  # type: ignore[arg-type]
        assert llm.get_metrics().step_count == 0
        assert llm.generate("hello", SamplingParams(max_tokens=1), use_tqdm=False)[0].finished


def test_an_interrupt_leaves_the_engine_usable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_llm(folder) as llm:
        assert llm._engine is not None
        loop, calls = llm._engine.loop, []
        step = loop.step

        def interrupted() -> list:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello"] * 20, SamplingParams(max_tokens=50, temperature=0), use_tqdm=False)
        assert_idle(llm)
        assert len(llm.generate("hello", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids) == 2


def test_without_a_tokenizer(folder: Path) -> None:
    with make_llm(folder, skip_tokenizer=True) as llm:
        [result] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, logprobs=1), use_tqdm=False)
        assert (result.outputs[0].text, len(result.outputs[0].token_ids)) == ("", 4)
        for call in (
            lambda: llm.generate("text"),
            llm.get_tokenizer,
            lambda: llm.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(RequestError, match="without a tokenizer"):
                call()


def test_close(folder: Path) -> None:
    llm = make_llm(folder)
    engine = llm._engine
    assert engine.compiles == 1  # type: ignore[union-attr]
    llm.close()
    llm.close()
    assert engine.is_closed  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="closed"):
        llm.generate("hello")


def test_a_folder_without_a_tokenizer_closes_the_engine_it_was_given(tmp_path: Path) -> None:
    harness = make_harness()
    info = EngineInfo(model="m", vocab_size=101, max_model_len=128, page_size=4, page_count=64, dtype="float32")
    engine = FakeLocalEngine(harness.loop, info, tmp_path)
    with pytest.raises(Exception, match=r"tokenizer\.json"):
        LLM.from_engine(engine, EngineConfig(model=ModelConfig(model="m")))  # type: ignore[arg-type]
    assert engine.is_closed


def test_importing_is_light() -> None:
    """`import jaxserve` loads nothing; the names load what they need; LLM brings no server stack and no jax yet."""
    code = (
        "import sys, jaxserve\n"
        "assert {'jax', 'numpy', 'tokenizers', 'fastapi'}.isdisjoint(sys.modules), 'import jaxserve'\n"
        "jaxserve.SamplingParams(temperature=0)\n"
        "assert {'jax', 'tokenizers'}.isdisjoint(sys.modules), 'SamplingParams'\n"
        "jaxserve.LLM\n"
        "assert {'jax', 'flax', 'fastapi', 'uvicorn', 'pydantic', 'transformers'}.isdisjoint(sys.modules)\n"
        "assert set(jaxserve.__all__) <= set(dir(jaxserve))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
