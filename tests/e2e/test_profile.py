"""A trace of a running server: steps and operations under their names in the source; refusals leave it serving."""

import gzip
import json

import pytest
import requests

from tests.e2e.test_life import SMALL, post

pytestmark = pytest.mark.timeout(300)


def test_a_trace_of_a_server_reads_like_the_source(serve, tiny_llama, tmp_path):
    server = serve("--model", str(tiny_llama), *SMALL, "--profile", str(tmp_path / "traces"))
    early = requests.post(f"{server.url}/stop_profile", timeout=60)
    assert early.status_code == 400 and "no trace is running" in early.json()["error"]["message"]
    for _ in range(2):     # one after the other, each a file of its own
        assert requests.post(f"{server.url}/start_profile", timeout=60).status_code == 200
        assert requests.post(f"{server.url}/start_profile", timeout=60).status_code == 400
        assert post(server.url, max_tokens=4, ignore_eos=True).status_code == 200
        assert requests.post(f"{server.url}/stop_profile", timeout=60).status_code == 200
    paths = sorted((tmp_path / "traces").rglob("*.trace.json.gz"))
    assert len(paths) == 2
    for path in paths:
        names = {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert any("layer_0/" in name for name in names), sorted(names)[:50]
        assert any(name.startswith("step") for name in names)
