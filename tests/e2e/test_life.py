"""A server's life: the first second, a client that leaves, an engine that is killed, the end; and wrong flags."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests

from tests.e2e.test_load import metric

pytestmark = pytest.mark.timeout(300)
SMALL = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "16M")


def children(pid: int) -> list[int]:
    """Processes started by `pid`."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def post(url: str, **body: object) -> requests.Response:
    return requests.post(f"{url}/v1/completions", json={"prompt": [5, 6, 7], "temperature": 0, **body}, timeout=120)


def test_health_answers_from_the_first_second_with_the_phase(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL, wait=False)
    begin, phases = time.monotonic(), []
    first_s = None
    while time.monotonic() - begin < 120:
        try:
            answer = requests.get(f"{server.url}/health", timeout=5)
        except requests.ConnectionError:
            time.sleep(0.05)
            continue
        first_s = first_s or time.monotonic() - begin
        if answer.status_code == 200:
            break
        assert answer.status_code == 503
        phases.append(answer.json()["error"]["message"])
        early = post(server.url)
        assert early.status_code in (200, 503), early.text
        time.sleep(0.05)
    assert requests.get(f"{server.url}/health", timeout=5).status_code == 200
    assert first_s is not None and first_s < 5.0
    assert phases, "the server was never seen starting"


@pytest.mark.timeout(600)
def test_once_serving_always_serving(demo_model, serve, tmp_path):
    """While the rest of the demo's programs is compiled, which takes more than a progress report, /health stays 200."""
    server = serve("--model", str(demo_model), "--max-model-len", "512", "--kv-cache-memory-bytes", "64M",
                   "--max-num-batched-tokens", "128", "--max-num-seqs", "16")
    seen = set()
    while "ready:" not in server.log():
        seen.add(requests.get(f"{server.url}/health", timeout=30).status_code)
        time.sleep(0.1)
    assert seen == {200}


def test_sigterm_finishes_what_runs_and_leaves_no_process(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL, "--shutdown-timeout", "60")
    pids = [server.pid, *children(server.pid)]
    assert len(pids) == 2
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(server.url, max_tokens=200, ignore_eos=True)))
    thread.start()
    server.wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 1)
    os.kill(server.pid, signal.SIGTERM)
    thread.join(60)
    assert answers and answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 200
    assert server.wait_exit(30) == 0
    assert not any(map(is_alive, pids))


def test_sigterm_without_grace_aborts_at_once(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL)
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(post(server.url, max_tokens=200, ignore_eos=True, n=3, temperature=1.0).status_code)
        except requests.ConnectionError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: metric(server.url, "vllm:num_requests_running") > 0)
    begin = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait_exit(20) == 0
    assert time.monotonic() - begin < 15
    for thread in threads:
        thread.join(10)
    assert len(answers) == 8


def test_a_client_that_leaves_frees_its_pages(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL)
    body = {"prompt": [5, 6, 7], "max_tokens": 250, "ignore_eos": True, "stream": True}
    for stream in (True, False):
        if stream:
            with requests.post(f"{server.url}/v1/completions", json=body, timeout=60, stream=True) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(requests.ReadTimeout):
                requests.post(f"{server.url}/v1/completions", json=body | {"stream": False, "n": 4}, timeout=0.05)
        server.wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 0, timeout_s=10)
        server.wait_for(lambda: metric(server.url, "vllm:kv_cache_usage_perc") == 0, timeout_s=10)
    assert post(server.url, max_tokens=3).status_code == 200


def test_a_killed_engine_fails_its_requests_and_comes_back(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL)
    (engine,) = children(server.pid)
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(server.url, max_tokens=250, ignore_eos=True)))
    thread.start()
    server.wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 1)
    os.kill(engine, signal.SIGKILL)
    thread.join(30)
    assert answers[0].status_code == 500
    assert "SIGKILL" in answers[0].json()["error"]["message"] or "engine" in answers[0].json()["error"]["message"]
    server.wait_for(lambda: requests.get(f"{server.url}/health", timeout=5).status_code == 200, timeout_s=120)
    assert post(server.url, max_tokens=3).status_code == 200
    assert children(server.pid) != [engine] and not is_alive(engine)


def test_a_killed_server_takes_its_engine_along(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL)
    (engine,) = children(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    server.wait_exit(10)
    deadline = time.monotonic() + 10
    while is_alive(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(engine)


@pytest.mark.parametrize(("flags", "words"), [
    (("--model", "m", "--blocksize", "16"), ("blocksize", "block-size")),
    (("--model", "m", "--block-size", "0"), ("block-size", "0")),
    (("--model", "m", "--tensor-parallel-size", "0"), ("tensor-parallel-size",)),
    (("--model", "m", "--enable-lora"), ("enable-lora",)),
    (("--model", "m", "--port", "many"), ("port", "many")),
    (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
])
def test_wrong_flags_end_at_once_with_a_sentence(flags, words):
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve.serve", *flags], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert time.monotonic() - begin < 4   # two seconds on an idle machine


def test_a_model_that_is_not_there_ends_the_server_with_the_ways_out(serve, tmp_path):
    server = serve("--model", str(tmp_path / "nothing"), wait=False)
    assert server.wait_exit(60) == 1
    assert "nothing" in server.log() and "Traceback" not in server.log()


def test_a_port_that_is_taken_is_an_error_at_once(serve, tiny_llama):
    server = serve("--model", str(tiny_llama), *SMALL)
    port = server.url.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve.serve", "--model", str(tiny_llama), "--port", port],
        capture_output=True, text=True, timeout=30, check=False,
    )
    assert done.returncode == 2 and port in done.stderr
