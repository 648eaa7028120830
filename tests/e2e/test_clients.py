"""The clients that every guide shows, unchanged but for the base URL, against a real server with the demo model."""

import asyncio
import json
import subprocess

import openai
import pytest
import requests

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
pytestmark = pytest.mark.timeout(300)


def test_curl_with_a_key_nobody_checks(demo_server):
    body = json.dumps({"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32})
    done = subprocess.run(
        ["curl", "-sS", f"{demo_server.url}/v1/chat/completions", "-H", "Content-Type: application/json",
         "-H", "Authorization: Bearer EMPTY", "-d", body],
        capture_output=True, text=True, timeout=120, check=True,
    )
    answer = json.loads(done.stdout)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_requests_completion(demo_server):
    answer = requests.post(
        f"{demo_server.url}/v1/completions",
        json={"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0},
        timeout=120,
    )
    assert answer.status_code == 200
    assert "Paris" in answer.json()["choices"][0]["text"]
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_requests_stream_is_server_sent_events(demo_server):
    with requests.post(
        f"{demo_server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": QUESTION, "max_tokens": 16, "temperature": 0, "stream": True},
        timeout=120, stream=True,
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.decode() for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1])
    assert "Paris" in text


def test_openai_sdk_plain_and_streamed_agree(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        plain = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
        assert "Paris" in plain.choices[0].message.content
        stream = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [plain.choices[0].finish_reason]


def test_async_openai_sdk_many_at_once(demo_server):
    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="EMPTY", max_retries=0) as client:
            async def one(stream: bool) -> str:
                reply = await client.chat.completions.create(
                    model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream=stream
                )
                if not stream:
                    return reply.choices[0].message.content
                return "".join([c.choices[0].delta.content or "" async for c in reply])

            return await asyncio.gather(*(one(index % 2 == 1) for index in range(6)))

    texts = asyncio.run(scenario())
    assert len(set(texts)) == 1 and "Paris" in texts[0]


def test_completions_with_logprobs_and_echo(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        reply = client.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=3, echo=True
        )
    choice = reply.choices[0]
    assert choice.text.startswith("The capital of France is")
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == reply.usage.total_tokens == len(logprobs.token_logprobs)
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == choice.text


def test_seeded_choices_differ_from_each_other_and_repeat(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        def ask() -> list[str]:
            reply = client.completions.create(
                model=MODEL, prompt="Once upon a time", n=3, seed=11, temperature=1.0, max_tokens=12
            )
            return [choice.text for choice in reply.choices]

        first = ask()
        assert ask() == first
    assert len(set(first)) == 3


def test_token_ids_round_trip(demo_server):
    post = lambda path, body: requests.post(demo_server.url + path, json=body, timeout=60).json()
    ids = post("/tokenize", {"model": MODEL, "prompt": "Hello, wörld! 12"})
    assert ids["count"] == len(ids["tokens"])
    assert post("/detokenize", {"model": MODEL, "tokens": ids["tokens"]})["prompt"] == "Hello, wörld! 12"
    by_ids = post("/v1/completions", {"model": MODEL, "prompt": ids["tokens"], "max_tokens": 5, "temperature": 0,
                                      "return_token_ids": True})
    by_text = post("/v1/completions", {"model": MODEL, "prompt": "Hello, wörld! 12", "max_tokens": 5, "temperature": 0})
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]
    assert len(by_ids["choices"][0]["token_ids"]) == 5


@pytest.mark.parametrize(("body", "status", "param"), [
    ({"messages": QUESTION, "model": "nope"}, 404, "model"),
    ({"messages": QUESTION, "temperature": 3}, 400, "temperature"),
    ({"messages": QUESTION, "max_tokens": 10**6}, 400, "max_tokens"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "input_tokens"),
    ({"messages": QUESTION, "response_format": {"type": "json_object"}}, 400, "response_format"),
])
def test_errors_have_openai_shape_and_the_server_lives_on(demo_server, body, status, param):
    answer = requests.post(f"{demo_server.url}/v1/chat/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
    assert error["message"]
    assert requests.get(f"{demo_server.url}/health", timeout=10).status_code == 200
