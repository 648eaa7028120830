"""A server with a draft model gives what it gives without one, counts what came true, and compiles nothing late."""

import json
import struct
from pathlib import Path

import pytest
import requests

from tests.e2e.test_life import SMALL, post
from tests.e2e.test_load import metric

pytestmark = pytest.mark.timeout(300)


def config(folder: Path, count: int = 4) -> tuple[str, str]:
    return "--speculative-config", json.dumps(
        {"method": "draft_model", "model": str(folder), "num_speculative_tokens": count}
    )


def truncated(folder: Path, out: Path, layers: int) -> Path:
    """The first layers of a model in one safetensors file, as a model of its own."""
    out.mkdir()
    for path in folder.glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"num_hidden_layers": layers}))
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body, kept, end = json.loads(data[8 : 8 + length]), data[8 + length :], {}, 0
    parts = []
    for name, entry in header.items():
        if name == "__metadata__" or (".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= layers):
            continue
        begin, stop = entry["data_offsets"]
        parts.append(body[begin:stop])
        kept[name] = entry | {"data_offsets": [end, end + stop - begin]}
        end += stop - begin
    text = json.dumps(kept).encode()
    (out / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    return out


def accepted(url: str) -> float:
    return metric(url, "vllm:spec_decode_num_accepted_tokens_total") / metric(
        url, "vllm:spec_decode_num_draft_tokens_total"
    )


@pytest.mark.slow
def test_the_model_as_its_own_draft(serve, tiny_llama):
    eager = (*SMALL, "--enforce-eager")
    plain = serve("--model", str(tiny_llama), *eager)
    drafting = serve("--model", str(tiny_llama), *eager, *config(tiny_llama))
    drafting.wait_ready()
    for fields in ({}, {"temperature": 0.8, "seed": 3}, {"n": 3, "temperature": 1.0, "seed": 4}):
        answers = [
            post(server.url, max_tokens=24, ignore_eos=True, **fields).json()["choices"] for server in (plain, drafting)
        ]
        assert answers[0] == answers[1], fields
        if not fields:     # greedy like the draft; what is drawn from flat logits seldom is the most likely token
            assert accepted(drafting.url) > 0.9
    assert "draft model" in drafting.log()
    assert metric(drafting.url, "jaxserve:compilations_after_ready_total") == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_truncated_smollm2_drafts_for_the_whole(demo_model, serve, tmp_path):
    server = serve(
        "--model", str(demo_model), "--max-model-len", "512", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "64", *config(truncated(demo_model, tmp_path / "draft", 15), 3),
    )
    answer = requests.post(f"{server.url}/v1/completions", timeout=300, json={
        "prompt": "The capital of France is", "temperature": 0, "max_tokens": 64,
    })
    assert "Paris" in answer.json()["choices"][0]["text"]
    assert accepted(server.url) > 0


def test_what_does_not_fit_is_refused_by_name(serve, tiny_llama, tmp_path):
    other = truncated(tiny_llama, tmp_path / "other", 1)
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 100}))
    server = serve("--model", str(tiny_llama), *SMALL, *config(other), wait=False)
    assert server.wait_exit(120) == 1
    assert "made for 100 positions" in server.log() and "--max-model-len 100" in server.log()
