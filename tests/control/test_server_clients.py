"""Real sockets: the OpenAI SDK against uvicorn, batches as they come, and clients that leave."""

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from jaxserve.server.app import ServerState
from tests.control.server_calls import MESSAGES, call, connect, served, wait_for
from tests.control.server_fakes import make_state


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ServerState, str]]:
    state = make_state(api_key=("secret",))
    with served(state) as url:
        yield state, url


def test_sync_sdk_plain_and_streamed(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="secret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        plain = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=2, n=2
        )
        assert [choice.message.content for choice in plain.choices] == ["Paris is", "aris is "]
        assert plain.choices[0].logprobs.content[0].top_logprobs[0].token == "P"
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == "Paris is"
        assert chunks[-1].usage.completion_tokens == 8 and chunks[-2].choices[0].finish_reason == "length"
        text = client.completions.create(model="tiny", prompt="abc", max_tokens=3, echo=True, logprobs=1)
        assert text.choices[0].text == "abcPar" and text.choices[0].logprobs.token_logprobs[0] is None
        pieces = client.completions.create(model="tiny", prompt="abc", max_tokens=3, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == "Par"


def test_sdk_errors_are_typed(server):
    state, url = server
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="nope", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
        assert caught.value.param == "temperature" and caught.value.type == "BadRequestError"
        with pytest.raises(openai.BadRequestError, match="response_format"):
            client.chat.completions.create(model="tiny", messages=MESSAGES, response_format={"type": "json_object"})
        state.text_engine.fail_after = (3, "non-finite logits")
        try:
            with pytest.raises(openai.APIError, match="non-finite logits"):
                list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        finally:
            state.text_engine.fail_after = None
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_async_sdk_many_at_once(server):
    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key="secret", max_retries=0) as client:

            async def one(stream: bool) -> str:
                reply = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=20, stream=stream
                )
                if not stream:
                    return reply.choices[0].message.content
                return "".join([chunk.choices[0].delta.content async for chunk in reply])

            return await asyncio.gather(*(one(index % 2 == 0) for index in range(16)))

    assert set(asyncio.run(scenario())) == {"Paris is nice. Paris"}


def test_tokens_arrive_while_the_engine_still_works(server):
    state, url = server
    state.text_engine.pause_s = 0.05
    arrivals = []
    try:
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json={"prompt": "a", "max_tokens": 6, "stream": True},
            headers={"Authorization": "Bearer secret"},
        ) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    arrivals.append((time.monotonic(), json.loads(line[6:])["choices"][0]["text"]))
    finally:
        state.text_engine.pause_s = 0.0
    assert "".join(text for _, text in arrivals) == "Paris "
    assert arrivals[-1][0] - arrivals[0][0] > 0.15  # not all at the end


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "max_tokens": 50},
        {"prompt": ["a", "b"], "max_tokens": 50, "n": 2},
    ],
)
def test_a_client_that_leaves_aborts_its_requests_at_once(stream, body):
    state = make_state()
    with served(state) as url:
        state.text_engine.pause_s = 0.05
        count = len(body["prompt"]) if isinstance(body["prompt"], list) else 1
        with httpx.Client(base_url=url) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body, timeout=0.2)
        begin = time.monotonic()
        wait_for(lambda: len(state.text_engine.aborted) == count and not state.live_ids)
        assert time.monotonic() - begin < 1.0
        assert state.text_engine.live == set() and state.live_count == 0
        ended = state.metrics.registry.get_sample_value(
            "vllm:request_success_total", {"model_name": "tiny", "engine": "0", "finished_reason": "abort"}
        )
        assert ended == count * body.get("n", 1)


def test_a_client_that_leaves_before_the_first_token_of_a_stream():
    state = make_state()
    with served(state) as url:
        state.text_engine.hold.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES, "stream": True}, timeout=0.2)
        wait_for(lambda: len(state.text_engine.aborted) == 1 and not state.live_ids)


def test_load_counts_what_runs():
    state = make_state()

    async def scenario() -> tuple[int, int]:
        state.text_engine.hold.clear()
        async with connect(state) as client:
            running = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a"}))
            while not state.text_engine.live:
                await asyncio.sleep(0.001)
            during = (await client.get("/load")).json()["server_load"]
            state.text_engine.hold.set()
            await running
            return during, (await client.get("/load")).json()["server_load"]

    assert asyncio.run(scenario()) == (1, 0)
    assert call(state, "GET", "/health").status_code == 200
