"""Options, keys, routing rule and metrics of replicas, without a cluster."""

from __future__ import annotations

import asyncio
import sys

import orjson
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.engine.familiar import PrefixMemory, familiar_first
from jaxserve.replicas import build_app
from jaxserve.replicas.forwarding import KEY_BYTES, Forwarded, Head, prompt_keys
from jaxserve.replicas.metrics import joined
from jaxserve.replicas.options import read_options
from jaxserve.replicas.replica import Replica


def test_options_come_as_texts_or_values():
    scaling, config = read_options({
        "config": "smollm2-135m.yaml", "model": "m", "min_replicas": "2", "max-replicas": 4,
        "target-ongoing-requests": 8, "prefix-routing": "false", "enforce-eager": "true", "max-model-len": "512",
    })
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 4, 8)
    assert scaling.prefix_routing is False
    assert config.engine.model.max_model_len == 512 and config.engine.compilation.enforce_eager


def test_as_many_replicas_as_the_least_where_nothing_else_is_said():
    assert read_options({"model": "m", "min-replicas": 3})[0].max_replicas == 3


@pytest.mark.parametrize(("arguments", "message"), [
    ({"port": "80"}, "port has no place here: Ray Serve listens"),
    ({"data-parallel-size": 2}, "data-parallel-size has no place here: replicas are what"),
    ({"min-replicas": "two"}, "min_replicas must be of type int, got 'two'"),
    ({"prefix-routing": 1}, "prefix_routing must be true or false, got 1"),
    ({"min-replicas": 4, "max-replicas": 2}, "max_replicas 2 is below min_replicas 4"),
    ({"max-ongoing-requests": 0}, "max_ongoing_requests must be at least 1, got 0"),
    ({"target-ongoing-requests": 0}, "target_ongoing_requests must be above 0, got 0"),
    ({"min-replica": 2}, "unknown key 'min"),
])
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_options({"model": "m", **arguments})


def chat(*texts: str, **more: object) -> bytes:
    return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text} for text in texts], **more})


def test_a_longer_conversation_begins_with_the_keys_of_the_shorter():
    first, second = "a" * 3 * KEY_BYTES, "b" * KEY_BYTES
    short, long = prompt_keys(chat(first)), prompt_keys(chat(first, second))
    assert len(short) == 3 and long[: len(short)] == short and len(long) > len(short)
    assert prompt_keys(chat("c" + first))[:1] != short[:1]
    assert prompt_keys(chat(first, cache_salt="s"))[:1] != short[:1], "who salts shares with nobody else"
    assert prompt_keys(chat(first, temperature=1.5)) == short


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'{"prompt": "short"}', b'{"messages": 5}', b"\xff"])
def test_what_has_no_long_prompt_has_no_keys(body):
    assert prompt_keys(body) == ()


def test_the_familiar_one_goes_first_while_that_is_fair():
    loads = {"a": 0, "b": 3, "c": 9}
    order = sorted(loads, key=loads.__getitem__)
    for rows, known, expected in ((64, {"b": 2}, "b"), (4, {"b": 2}, "a"), (64, {}, "a"), (16, {"c": 5, "b": 1}, "a")):
        known = {name: known.get(name, 0) for name in loads}
        got = familiar_first(order, known, loads.__getitem__, lambda _, rows=rows: rows)
        assert got[0] == expected and sorted(got) == sorted(loads), (rows, known)


def test_a_memory_forgets_the_oldest():
    memory = PrefixMemory()
    memory.note([b"1", b"2", b"3"], most=10)
    memory.note([b"4", b"1"], most=3)
    assert memory.known([b"1", b"4"]) == 2 and memory.known([b"2"]) == 0 and memory.known([b"3", b"2"]) == 1


def test_metrics_of_all_are_one_page():
    page = '# HELP n Requests.\n# TYPE n gauge\nn{model_name="m"} %d\n# TYPE k counter\nk_total %d\n'
    both = joined({"x": page % (1, 2), "y": page % (3, 4)}).decode().splitlines()
    assert 'n{model_name="m",replica="x"} 1.0' in both and 'n{model_name="m",replica="y"} 3.0' in both
    assert 'k_total{replica="y"} 4.0' in both and sum(line.startswith("# TYPE n ") for line in both) == 1


def forwarded() -> Forwarded:
    return Forwarded("POST", "/v1/x", b"a=1", ((b"k", b"v"),), b"body", None, ())


async def pieces_of(app) -> list[object]:
    replica = object.__new__(Replica)
    replica._app = app
    return [piece async for piece in replica.forward(forwarded())]


@pytest.mark.asyncio
async def test_a_reply_comes_as_head_and_pieces():
    async def app(scope, receive, send):
        asked = await receive()
        await send({"type": "http.response.start", "status": 201, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in (b"1", b"2"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": asked["body"] + scope["query_string"], "more_body": False})

    head, *rest = await pieces_of(app)
    assert isinstance(head, Head) and head.status == 201 and head.is_stream
    assert b"".join(rest) == b"12bodya=1" and len(rest) <= 2, "what waits goes as one"


@pytest.mark.asyncio
async def test_a_client_that_leaves_is_told_to_the_app():
    told = asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.set()
            raise

    replica = object.__new__(Replica)
    replica._app = app
    stream = replica.forward(forwarded())
    assert isinstance(await anext(stream), Head) and await anext(stream) == b"1"
    await stream.aclose()
    await asyncio.wait_for(told.wait(), 5)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[ray\]'"):
        build_app({"model": "m"})
