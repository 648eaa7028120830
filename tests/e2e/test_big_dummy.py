"""`qwen3b.yaml` with random weights, from a folder that holds only config and tokenizer: a 3-billion model on a CPU."""

import json

import pytest
import requests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# What Qwen/Qwen2.5-3B-Instruct's config.json says.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2", "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}


def test_qwen3b_starts_and_answers(serve, demo_model, tmp_path):
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):   # any tokenizer smaller than the embedding will do
        (folder / name).write_bytes((demo_model / name).read_bytes())
    server = serve("--config", "qwen3b.yaml", "--model", str(folder), "--load-format", "dummy", wait=False)
    server.wait_for(lambda: server._get("/health") == 200, timeout_s=900)
    answer = requests.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "qwen2.5-3b-instruct", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        timeout=600,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1
    print(server.log())
