"""--speculative-config with a draft model: vLLM's keys, and every wrong value named."""

import pytest

from jaxserve.core.config import SpeculativeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.flags.speculative import speculative_config

GOOD = {"method": "draft_model", "model": "small", "num_speculative_tokens": 4}


def test_the_keys_are_read():
    assert speculative_config(GOOD) == SpeculativeConfig(method="draft_model", model="small", num_speculative_tokens=4)


@pytest.mark.parametrize(("change", "word"), [
    ({"model": None}, "needs a model"), ({"model": ""}, "needs a model"),
    ({"num_speculative_tokens": None}, "in [1, 32]"),
    ({"num_speculative_tokens": 33}, "33"), ({"prompt_lookup_max": 3}, "prompt_lookup_max"),
    ({"draft_tensor_parallel_size": 1}, "draft_tensor_parallel_size"), ({"method": "eagle"}, "eagle"),
])
def test_what_is_wrong_is_named(change, word):
    with pytest.raises(ConfigError, match=word.replace("[", r"\[")):
        speculative_config(GOOD | change)
