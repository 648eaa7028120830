"""Real servers: two devices answer over HTTP as one does, and start again from the programs they kept."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.test_life import SMALL, post

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_devices_serve_what_one_does(serve, tiny_llama):
    def answers(size: int) -> tuple[list[str], str]:
        server = serve("--model", str(tiny_llama), *SMALL, "--tensor-parallel-size", str(size))
        server.wait_ready()

        def ask(index: int) -> str:
            reply = post(
                server.url, prompt=[1 + index, 7, 9], max_tokens=8 + index, ignore_eos=True, temperature=index % 2,
                seed=index,
            )
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["text"]

        with ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(ask, range(12)))
        log = server.log()
        server.stop()
        return texts, log

    one, _ = answers(1)
    two, _ = answers(2)
    again, log = answers(2)
    assert two == one and again == one
    assert "2 x cpu" in log and "0 of them compiled by this start" in log
