"""Requests without a seed of their own draw theirs from `--seed`: equal servers, equal draws in equal order."""

from jaxserve.core.config import ModelConfig
from jaxserve.core.request import EngineInfo
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.text_request import TextRequest
from jaxserve.text.served_text import ServedText

INFO = EngineInfo(model="m", vocab_size=320, max_model_len=64, page_size=16, page_count=9, dtype="float32")


def draws(folder, server_seed: int, **params) -> list[int]:
    text = ServedText.load(folder, ModelConfig(model="m", seed=server_seed, skip_tokenizer_init=True))
    request = TextRequest(request_id="r", prompt_token_ids=(5,), params=SamplingParams(**params))
    return [text.engine_requests(request, (5,), INFO)[0].seed for _ in range(3)]


def test_unseeded_requests_follow_the_servers_seed(tiny_llama):
    assert draws(tiny_llama, 1) == draws(tiny_llama, 1) != draws(tiny_llama, 2)
    assert len(set(draws(tiny_llama, 1))) == 3


def test_a_requests_own_seed_stands(tiny_llama):
    assert draws(tiny_llama, 1, seed=7) == [7, 7, 7]
