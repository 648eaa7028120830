"""Two processes of two devices each, as on two machines: they answer as one does, and end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from jaxserve.cluster.handshake import SECRET
from tests.conftest import FIXTURES, Server, free_port
from tests.e2e.test_life import SMALL, children, post

pytestmark = pytest.mark.timeout(600)

NOTICED_S_MAX = 10.0
SHORT = tuple("128" if flag == "256" else flag for flag in SMALL)     # of a model with fewer positions
ENVIRONMENT = {SECRET: "a secret of the tests"}
Pair = tuple[Server, Server]


@pytest.fixture
def start_pair(serve, tiny_llama) -> Callable[..., Pair]:
    """Starts leader and follower, and waits until they serve."""
    def start(
        *flags: str, wait: bool = True, model: Path = tiny_llama, sizes: tuple[str, ...] = SMALL, port: int = 0
    ) -> Pair:
        shared = (
            "--model", str(model), *sizes, "--enforce-eager", "--tensor-parallel-size", "4", "--nnodes", "2",
            "--master-port", str(port or free_port(2)), *flags,
        )
        leader = serve(*shared, wait=False, environment=ENVIRONMENT)
        follower = serve(*shared, "--node-rank", "1", wait=False, environment=ENVIRONMENT)
        if wait:
            leader.wait_serving()
        return leader, follower

    return start


def answers(url: str) -> list[Any]:
    """Of twelve requests at once, greedy and drawn, some with logprobs; and of a chat."""
    def ask(index: int) -> Any:
        reply = post(
            url, prompt=[1 + index, 7, 9] * (1 + index), max_tokens=8 + index, ignore_eos=True,
            temperature=index % 2, seed=index, logprobs=2 if index % 3 == 0 else None,
        )
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        found = (choice["logprobs"] or {}).get("token_logprobs", [])
        return choice["text"], [round(value, 3) for value in found]

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(12)))
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return [*texts, reply.json()["choices"][0]["message"]["content"]]


def test_two_processes_answer_as_one_and_stop_together(serve, start_pair, tiny_llama):
    one = serve("--model", str(tiny_llama), *SMALL, "--enforce-eager")
    expected = answers(one.url)
    one.stop()
    port = free_port(2)
    leader, follower = start_pair(port=port)
    assert "4 x cpu on 2 machines" in leader.log()
    assert listening(port) == {"127.0.0.1"}, "jax's coordinator is on --master-addr only"
    assert listening(port + 1) == set(), "all are here: our channel takes nobody else"
    assert answers(leader.url) == expected
    os.kill(follower.pid, signal.SIGTERM)
    assert answers(leader.url) == expected, "a follower's SIGTERM is left to the leader"
    leader.stop()
    assert follower.wait_exit(NOTICED_S_MAX) == 0


def listening(port: int) -> set[str]:
    """Addresses that somebody listens on at a port of this machine."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:       # LISTEN; words of four bytes in the machine's order
                found.add(socket.inet_ntoa(bytes.fromhex(address[-8:])[::-1]) if _is_v4(address) else address)
    return found


def _is_v4(address: str) -> bool:
    return len(address) == 8 or address[:24] == "0000000000000000FFFF0000"


@pytest.mark.slow
def test_a_second_start_compiles_nothing(start_pair):
    leader, _ = start_pair()
    expected = answers(leader.url)
    leader.stop()
    leader, _ = start_pair()
    assert "0 compiled" in leader.log() and answers(leader.url) == expected


@pytest.mark.slow
def test_whole_experts_on_two_machines(serve, start_pair):
    model = FIXTURES / "families" / "qwen3-moe"
    one = serve("--model", str(model), *SHORT, "--enforce-eager", "--skip-tokenizer-init")
    expected = ids(one.url)
    one.stop()
    leader, _ = start_pair("--enable-expert-parallel", "--skip-tokenizer-init", model=model, sizes=SHORT)
    assert ids(leader.url) == expected


@pytest.mark.slow
def test_a_model_that_drafts_on_two_machines(serve, start_pair, tiny_llama):
    one = serve("--model", str(tiny_llama), *SMALL, "--enforce-eager")
    expected = answers(one.url)
    one.stop()
    drafting = {"method": "draft_model", "model": str(tiny_llama), "num_speculative_tokens": 3}
    leader, _ = start_pair("--speculative-config", json.dumps(drafting))
    assert answers(leader.url) == expected
    page = requests.get(f"{leader.url}/metrics", timeout=10).text
    drafted, accepted = (
        sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"vllm:spec_decode_{name}"))
        for name in ("num_draft_tokens_total", "num_accepted_tokens_total")
    )
    assert drafted > 0 and accepted > 0.5 * drafted


def ids(url: str) -> list[Any]:
    """Greedy tokens of a few prompts."""
    replies = [
        post(url, prompt=[3 + index, 7, 9], max_tokens=12, ignore_eos=True, temperature=0, return_token_ids=True,
             detokenize=False)
        for index in range(6)
    ]
    assert all(reply.status_code == 200 for reply in replies), replies[0].text
    return [reply.json()["choices"][0]["token_ids"] for reply in replies]


class Stream(threading.Thread):
    """A request that runs until something happens to it; `end` is its last event."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self.events, self.end_s = url, [], 0.0
        self.start()

    def run(self) -> None:
        body = {"prompt": [1, 2], "max_tokens": 250, "ignore_eos": True, "temperature": 0, "stream": True}
        try:
            with requests.post(f"{self._url}/v1/completions", json=body, stream=True, timeout=60) as reply:
                for line in reply.iter_lines():
                    if line.startswith(b"data: {"):
                        self.events.append(json.loads(line[6:]))
        except requests.RequestException as error:
            self.events.append({"broken": str(error)})
        self.end_s = time.monotonic()


@pytest.mark.parametrize(("victim", "number"), [
    ("follower", signal.SIGKILL),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("engine", signal.SIGKILL), ("leader", signal.SIGKILL),
        ("follower", signal.SIGSTOP), ("engine", signal.SIGSTOP), ("leader", signal.SIGSTOP),
    )),
], ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_process_that_dies_or_stalls_ends_them_all(start_pair, victim, number):
    leader, follower = start_pair()
    engine = children(leader.pid)[0]
    stream = Stream(leader.url)
    leader.wait_for(lambda: len(stream.events) > 3)
    pid = {"follower": follower.pid, "engine": engine, "leader": leader.pid}[victim]
    begin_s = time.monotonic()
    os.kill(pid, number)
    seen: list[int] = []
    watching = threading.Thread(target=watch_health, args=(leader.url, seen), daemon=True)
    watching.start()
    stream.join(NOTICED_S_MAX + 1)
    assert stream.end_s and stream.end_s - begin_s < NOTICED_S_MAX, "the running request hangs"
    if victim == "leader":
        assert "broken" in stream.events[-1]
        assert leader.wait_exit(NOTICED_S_MAX) == -signal.SIGKILL, "stopped, it is killed by its engine"
    else:
        assert "engine died" in stream.events[-1]["error"]["message"], stream.events[-1]
        assert leader.wait_exit(NOTICED_S_MAX + 5) == 1
        watching.join()
        assert 503 in seen and 200 not in seen[seen.index(503):]
    if number == signal.SIGSTOP and victim == "follower":
        os.kill(pid, signal.SIGCONT)
    assert follower.wait_exit(NOTICED_S_MAX) != 0
    assert time.monotonic() - begin_s < 2 * NOTICED_S_MAX


def watch_health(url: str, seen: list[int]) -> None:
    """Collects what /health says until nobody answers."""
    while True:
        try:
            seen.append(requests.get(f"{url}/health", timeout=5).status_code)
        except requests.RequestException:
            return
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [1.0, 4.0, 8.0])
def test_a_follower_that_dies_while_starting_ends_the_leader(start_pair, delay_s):
    leader, follower = start_pair(wait=False)
    leader.wait_for(lambda: "process 1 of 2 is here" in leader.log())
    time.sleep(delay_s)
    os.kill(follower.pid, signal.SIGKILL)
    assert leader.wait_exit(NOTICED_S_MAX) == 1
    assert "process 1" in leader.log()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 2.0])
def test_a_leader_that_dies_while_starting_ends_the_follower(start_pair, delay_s):
    leader, follower = start_pair(wait=False)
    leader.wait_for(lambda: "process 1 of 2 is here" in leader.log())
    time.sleep(delay_s)
    os.kill(leader.pid, signal.SIGKILL)
    assert follower.wait_exit(NOTICED_S_MAX) != 0


@pytest.mark.slow
def test_what_differs_is_named_and_nobody_serves(serve, tiny_llama):
    shared = ("--model", str(tiny_llama), "--tensor-parallel-size", "2", "--nnodes", "2", "--master-port",
              str(free_port(2)))
    leader = serve(*shared, "--max-num-seqs", "4", wait=False, environment=ENVIRONMENT)
    follower = serve(*shared, "--max-num-seqs", "8", "--node-rank", "1", wait=False, environment=ENVIRONMENT)
    assert leader.wait_exit(60) == 1 and follower.wait_exit(NOTICED_S_MAX) != 0
    assert "max-num-seqs is 8 at process 1" in leader.log() and "max-num-seqs is 8" in follower.log()
