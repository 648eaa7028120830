"""The text engine over an engine that says what it is told: deltas, stop strings, choices, aborts, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from jaxserve.core.errors import EngineBusyError, RequestError
from jaxserve.core.request import EngineRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.text_request import TextDelta, TextRequest
from jaxserve.text.completion import CompletionText
from jaxserve.text.served_text import ServedText
from jaxserve.text.stop_strings import StopStrings
from jaxserve.text_engine import TextEngine
from tests.text_fixtures import FakeAsyncEngine, output, scored, sentencepiece, served_text

TEXT = served_text(eos=(257,))
TOKENIZER = TEXT.need_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


def request(prompt: object = "hello", request_id: str = "r", **params: object) -> TextRequest:
    fields = {"truncate_prompt_tokens", "cache_salt", "priority"}
    own = {name: params.pop(name) for name in fields & params.keys()}
    prompt_fields = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": tuple(prompt)}  # type: ignore[call-overload]
    return TextRequest(request_id=request_id, params=SamplingParams(**params), **prompt_fields, **own)  # type: ignore[arg-type]


def completion(tokens: str = "", **params: object) -> CompletionText:
    sent = EngineRequest(request_id="r/0", prompt_token_ids=ids("hello"), params=SamplingParams(**params))  # type: ignore[arg-type]
    return CompletionText(sent, TOKENIZER)


class Reader:
    """Reads a stream in a task of its own, as a server would."""

    def __init__(self, engine: FakeAsyncEngine, sent: TextRequest, text: ServedText = TEXT) -> None:
        self.engine, self.text_engine = engine, TextEngine(engine, text)
        self.batches: list[list[TextDelta]] = []
        self.stream: AsyncIterator[list[TextDelta]] = self.text_engine.stream(sent)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for batch in self.stream:
            self.batches.append(batch)

    @property
    def deltas(self) -> list[TextDelta]:
        return [delta for batch in self.batches for delta in batch]


def run(scenario: Callable[[FakeAsyncEngine], object]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(FakeAsyncEngine()), 10)  # type: ignore[arg-type]

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_text_comes_as_deltas_and_ends_with_eos() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        reader = Reader(engine, request(max_tokens=50, seed=4, cache_salt="s", priority=3))
        await engine.submitted.wait()
        [sent] = engine.requests
        assert (sent.request_id, sent.prompt_token_ids, sent.seed, sent.eos_token_ids) == (
            "r/0",
            ids("hello"),
            4,
            (257,),
        )
        assert (sent.cache_salt, sent.priority, sent.params.max_tokens) == ("s", 3, 50)
        engine.say(output("r/0", *ids("he"), cached_token_count=1))
        await settle()
        engine.say(output("r/0", *ids("y")), output("r/0", 257, end="stop"))
        await reader.task
        assert [delta.text for delta in reader.deltas] == ["he", "y"], "two outputs at once are one delta"
        first, last = reader.deltas
        assert (first.prompt_token_ids, first.cached_token_count, first.finish_reason) == (ids("hello"), 1, None)
        assert (last.token_ids, last.finish_reason, last.stop_reason) == ((*ids("y"), 257), "stop", None)
        assert last.prompt_token_ids is None and not engine.aborted

    run(scenario)


def test_choices_share_prompt_and_seed() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        reader = Reader(engine, request(n=3))
        await engine.submitted.wait()
        assert [sent.request_id for sent in engine.requests] == ["r/0", "r/1", "r/2"]
        assert [sent.choice for sent in engine.requests] == [0, 1, 2]
        assert len({sent.seed for sent in engine.requests}) == 1
        engine.say(output("r/2", *ids("c"), end="length"), output("r/0", *ids("a"), end="length"))
        await settle()
        assert {delta.choice: delta.text for delta in reader.batches[0]} == {2: "c", 0: "a"}
        assert not reader.task.done()
        engine.say(output("r/1", end="error", error="NaN"))
        await reader.task
        assert (reader.deltas[-1].finish_reason, reader.deltas[-1].error) == ("error", "NaN")

    run(scenario)


def test_a_stop_string_ends_the_choice_and_aborts_its_sequence() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        reader = Reader(engine, request(n=2, stop=["lo w"], max_tokens=30))
        await engine.submitted.wait()
        engine.say(output("r/0", *ids("hello world")))
        late = engine.sinks["r/0"]
        await settle()
        assert engine.aborted == ["r/0"]
        late(output("r/0", *ids("more")))
        await settle()
        engine.say(output("r/1", *ids("x"), end="length"))
        await reader.task
        ended = next(delta for delta in reader.deltas if delta.choice == 0)
        assert (ended.text, ended.finish_reason, ended.stop_reason) == ("hel", "stop", "lo w")
        assert TOKENIZER.decode(ended.token_ids) == "hello w"
        assert [delta.choice for delta in reader.deltas] == [0, 1] and engine.aborted == ["r/0"]

    run(scenario)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_early_aborts_what_runs(how: str) -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        if how == "close":
            text_engine = TextEngine(engine, TEXT)
            stream = text_engine.stream(request(n=2))
            first = asyncio.create_task(anext(stream))
            await engine.submitted.wait()
            engine.say(output("r/0", 1, end="length"))
            await first
            await stream.aclose()
            assert engine.aborted == ["r/1"]
            assert not text_engine._live
            return
        reader = Reader(engine, request(n=2))
        await engine.submitted.wait()
        reader.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader.task
        assert engine.aborted == ["r/0", "r/1"]

    run(scenario)


def test_an_engine_that_refuses() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        engine.refuses = EngineBusyError("full")
        text_engine = TextEngine(engine, TEXT)
        for _ in range(2):  # the id is free again
            with pytest.raises(EngineBusyError):
                await anext(text_engine.stream(request()))

    run(scenario)


def test_it_says_which_engine_took_a_request() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        told: list[int] = []
        stream = TextEngine(engine, TEXT).stream(request(), told.append)
        first = asyncio.ensure_future(anext(stream))
        await engine.submitted.wait()
        engine.say(output("r/0", 1, end="length"))
        await first
        assert told == [1]

    run(scenario)


def test_one_id_at_a_time() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        reader = Reader(engine, request())
        await engine.submitted.wait()
        with pytest.raises(RequestError, match="'r' is running already"):
            await anext(reader.text_engine.stream(request()))
        engine.say(output("r/0", 1, end="length"))
        await reader.task

    run(scenario)


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        (
            request([1] * 65),
            "input_tokens",
            "maximum context length is 64 tokens. However, your prompt contains 65 input",
        ),
        (request([1] * 64), "max_tokens", "max_tokens must be at least 1, got 0."),
        (request(max_tokens=65), "max_tokens", "max_tokens=65 cannot be greater than max_model_len=64. Please request"),
        (request([1, 400]), "prompt", "Token id 400 is out of vocabulary"),
        (request([-1]), "prompt", "Token id -1 is out of vocabulary"),
        (request(""), "prompt", "cannot be empty"),
        (request(logprobs=21), "logprobs", "Requested logprobs of 21, which is greater than max allowed: 20"),
        (request(truncate_prompt_tokens=65), "truncate_prompt_tokens", r"must be in \[1, 64\]"),
        (request(bad_words=["a b c d e f g"]), "bad_words", "at most"),
        (request([1] * 60, min_tokens=8), "min_tokens", "less than or equal to max_tokens=4"),
    ],
)
def test_refusals_come_before_the_engine_hears(sent: TextRequest, param: str, message: str) -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        with pytest.raises(RequestError, match=message) as caught:
            await anext(TextEngine(engine, TEXT).stream(sent))
        assert caught.value.param == param
        assert not engine.requests

    run(scenario)


@pytest.mark.parametrize(
    ("count", "keep", "max_tokens", "left", "room"),
    [
        (10, 3, None, 3, 61),
        (10, -1, None, 10, 54),
        (100, -1, 20, 44, 20),
        (100, -1, None, 63, 1),
        (10, None, 60, 10, 54),
    ],
)
def test_lengths(count: int, keep: int | None, max_tokens: int | None, left: int, room: int) -> None:
    sent = request(list(range(count)), truncate_prompt_tokens=keep, max_tokens=max_tokens)
    [one] = TEXT.engine_requests(sent, sent.prompt_token_ids or (), FakeAsyncEngine().info)
    assert one.prompt_token_ids == tuple(range(count))[-left:]
    assert one.params.max_tokens == room


def test_ignore_eos_and_bad_words() -> None:
    [one] = TEXT.engine_requests(request(ignore_eos=True, bad_words=["hello"]), (1,), FakeAsyncEngine().info)
    assert one.eos_token_ids == ()
    assert one.params.bad_words_token_ids == (ids("hello"), ids(" hello"))


def test_without_a_tokenizer() -> None:
    bare = ServedText(tokenizer=None, template=TEXT.template)

    async def scenario(engine: FakeAsyncEngine) -> None:
        text_engine = TextEngine(engine, bare)
        assert (text_engine.has_tokenizer, text_engine.has_chat_template, text_engine.token_text(1)) == (
            False,
            False,
            "",
        )
        for refused in (request("text"), request([1], stop=["x"])):
            with pytest.raises(RequestError, match="without a tokenizer"):
                await anext(text_engine.stream(refused))
        with pytest.raises(RequestError, match="without a tokenizer"):
            await text_engine.render_chat([{"role": "user", "content": "x"}])
        reader = Reader(engine, request([1, 2], logprobs=0), bare)
        await engine.submitted.wait()
        engine.say(output("r/0", 7, end="length", logprobs=(scored(7),)))
        await reader.task
        [delta] = reader.deltas
        assert (delta.text, delta.token_ids, delta.logprobs[0].token.text) == ("", (7,), "")

    run(scenario)


def test_long_texts_and_other_doors() -> None:
    async def scenario(engine: FakeAsyncEngine) -> None:
        text_engine = TextEngine(engine, TEXT)
        long = "hello " * 1000
        assert tuple(await text_engine.encode(long)) == ids(long)
        assert text_engine.decode(ids("<|im_end|>a")) == "<|im_end|>a"
        assert text_engine.decode(ids("<|im_end|>a"), skip_special_tokens=True) == "a"
        with pytest.raises(RequestError, match="out of vocabulary"):
            text_engine.decode([400])
        chat = [{"role": "user", "content": "x" * 30_000}]
        assert (await text_engine.render_chat(chat)).count("x") == 30_000
        assert text_engine.has_chat_template and text_engine.max_logprobs == 20

    run(scenario)


def split(tokens: tuple[int, ...], size: int, end: str) -> list[list[int]]:
    return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("said", "params", "text", "reason"),
    [
        ("a🎉b", {}, "a🎉b", None),
        ("abcd", {"stop": ["bc"]}, "a", "bc"),
        ("abcd", {"stop": ["bc"], "include_stop_str_in_output": True}, "abc", "bc"),
        ("xabxab", {"stop": ["ab"], "min_tokens": 3}, "xabx", "ab"),
        ("abcabx", {"stop": ["abx"]}, "abc", "abx"),
        ("hello é", {"stop": ["zzz"]}, "hello é", None),
        ("<|im_end|>a", {"skip_special_tokens": False}, "<|im_end|>a", None),
        ("abc", {"detokenize": False}, "", None),
    ],
)
def test_text_of_a_choice(size: int, said: str, params: dict[str, object], text: str, reason: str | None) -> None:
    choice = completion(max_tokens=40, **params)
    deltas = []
    parts = split(ids(said), size, "length")
    for at, part in enumerate(parts):
        deltas.append(choice.take([output("r/0", *part, end="length" if at == len(parts) - 1 else None)]))
        if choice.is_finished:
            break
    assert "".join(delta.text for delta in deltas) == text
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop" if reason else "length", reason)


def test_a_string_that_could_not_stop_does_not_stop_later() -> None:
    """What ended within min_tokens stays text, also while it is held back as the beginning of another stop string."""
    stops = StopStrings(["abc", "b"], included=False)
    assert stops.push("ab", may_stop=False) == ("", None)
    assert stops.push("x") == ("abx", None)


@pytest.mark.parametrize(("included", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_token_is_no_text(included: bool, text: str) -> None:
    choice = completion(stop_token_ids=ids("b"), include_stop_str_in_output=included)
    delta = choice.take([output("r/0", *ids("ab"), end="stop", stop_reason=ids("b")[0])])
    assert (delta.text, delta.token_ids, delta.stop_reason) == (text, ids("ab"), ids("b")[0])


def test_what_is_held_back_comes_at_the_end() -> None:
    choice = completion(stop=["abc"])
    assert choice.take([output("r/0", *ids("xab"))]).text == "x"
    assert choice.take([output("r/0", end="abort")]).text == "ab"
    half = completion()
    assert half.take([output("r/0", ids("é")[0] if len(ids("é")) > 1 else ids("🎉")[0])]).text == ""
    assert half.take([output("r/0", end="length")]).text == "\ufffd"


def test_a_stop_string_does_not_match_the_prompt() -> None:
    choice = completion(stop=["hello!"])
    assert choice.take([output("r/0", *ids("!"), end="length")]).text == "!"


def test_logprobs_carry_texts_and_stop_with_the_text() -> None:
    tokens = ids("abcd")
    choice = completion(stop=["b"], logprobs=2)
    first = output(
        "r/0",
        *tokens,
        logprobs=tuple(scored(token, ids("xy")) for token in tokens),
        prompt_logprobs=(None, scored(ids("é")[0])),
    )
    delta = choice.take([first])
    assert [entry.token.text for entry in delta.logprobs] == ["a", "b"]
    top = delta.logprobs[0].top
    assert [(entry.text, entry.logprob, entry.rank) for entry in top] == [("x", -0.5, 1), ("y", -1.5, 2)]
    assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None
    assert delta.prompt_logprobs[1].token.utf8 == "é".encode()  # type: ignore[union-attr]


def test_a_sentencepiece_completion_keeps_its_leading_space() -> None:
    """After a prompt the first token's space belongs to the text; at the very beginning it does not."""
    tokenizer = served_text(sentencepiece()).need_tokenizer()
    hello = tokenizer.token_id("▁hello")
    for prompt, text in (("a", " hello"), ("<s>", "hello")):
        prompt_ids = tuple(tokenizer.encode(prompt)) if prompt == "a" else (tokenizer.token_id("<s>"),)
        sent = EngineRequest(request_id="r/0", prompt_token_ids=prompt_ids, params=SamplingParams())  # type: ignore[arg-type]
        assert CompletionText(sent, tokenizer).take([output("r/0", hello, end="length")]).text == text  # type: ignore[arg-type]
