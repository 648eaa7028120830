"""Two engines behind one port: equal answers, a killed one fails only its own streams and comes back."""

import os
import signal
import threading
import time

import pytest
import requests

from tests.e2e.test_life import SMALL, children, is_alive, post

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MANY = 60       # requests, of which eight run at once: enough to be there when an engine is killed


def engine_metric(url: str, name: str) -> dict[str, float]:
    """A metric's value by engine."""
    page = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    lines = [line for line in page if line.startswith(name + "{")]
    return {line.split('engine="')[1][0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def finished(url: str) -> list[tuple[str, float]]:
    """Samples of how requests ended."""
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    return [
        (line, float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("vllm:request_success_total{")
    ]


def test_two_engines_answer_and_one_may_die(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL, "--data-parallel-size", "2", "--enforce-eager")
    engines = children(server.pid)
    assert len(engines) == 2
    server.wait_for(lambda: engine_metric(server.url, "vllm:cache_config_info").keys() == {"0", "1"})
    server.wait_for(lambda: server.log().count("ready:") == 2)
    answers: list[requests.Response] = []

    def ask() -> None:
        answers.append(post(server.url, max_tokens=200, ignore_eos=True, prompt=[5, 6, 7, len(answers)]))

    threads = [threading.Thread(target=ask) for _ in range(MANY)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: all(engine_metric(server.url, "vllm:num_requests_running").values()))
    os.kill(engines[0], signal.SIGKILL)
    assert requests.get(f"{server.url}/health", timeout=5).status_code == 200
    for thread in threads:
        thread.join(120)
    codes = sorted(answer.status_code for answer in answers)
    assert codes[0] == 200 and codes[-1] >= 500 and len(codes) == MANY, codes
    assert post(server.url, max_tokens=4).status_code == 200
    begin = time.monotonic()
    while len([pid for pid in children(server.pid) if is_alive(pid)]) < 2 or server.log().count("ready:") < 3:
        assert time.monotonic() - begin < 120 and requests.get(f"{server.url}/health", timeout=5).status_code == 200
        time.sleep(0.1)
    for number in range(6):
        assert post(server.url, max_tokens=2, prompt=[number, 1, 2]).status_code == 200
    assert engine_metric(server.url, "vllm:generation_tokens_total")["0"] > 0, "the one that came back takes its part"
    done = {
        engine: [value for line, value in finished(server.url) if f'engine="{engine}"' in line] for engine in ("0", "1")
    }
    assert all(sum(values) > 0 for values in done.values()), "each engine's own requests"
    assert requests.get(server.url, timeout=5).text.startswith("<!doctype html>"), "one page for all"
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait_exit(30) == 0
