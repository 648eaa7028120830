"""`--attention-backend`: Triton's kernels through the engine, interpreted, give XLA's tokens; refusals at start.

On several devices: test_tensor_parallel.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.core.errors import ConfigError
from tests.device.fixture_models import FIXTURES
from tests.device.interpreted_kernels import OPS, interpret
from tests.device.test_kv_codes import scored

LLAMA = FIXTURES / "tiny-llama3"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel is traced."""
    return interpret(monkeypatch.setattr)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_triton_through_the_engine_gives_the_tokens_of_xla(interpreted: dict[str, int], tmp_path: Path) -> None:
    """One cache folder for both: an implementation is part of a program's key."""
    options = {"compilation_cache_dir": str(tmp_path / "programs")}
    expected, tokens, _ = scored(LLAMA, attention_backend="xla", **options)
    assert not interpreted
    got, same_tokens, _ = scored(LLAMA, attention_backend="triton", **options)
    assert interpreted.keys() == set(OPS)
    assert same_tokens == tokens
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(("backend", "reason"), [
    ("triton", "triton: needs a GPU, the target is 'cpu'; .*values must be bfloat16 or float16"),
    ("mosaic_gpu", "mosaic_gpu: needs "),
    ("native", "native: "),
])
def test_what_cannot_serve_is_refused_at_start_by_its_own_reasons(backend: str, reason: str) -> None:
    """float32, and heads that no kernel but XLA's takes."""
    start = f"attention-backend {backend}: .*: no implementation serves this request. {reason}"
    with pytest.raises(ConfigError, match=start):
        scored(LLAMA, attention_backend=backend)
