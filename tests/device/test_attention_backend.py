"""`--attention-backend`: Triton's kernels through the engine, interpreted, give XLA's tokens; refusals at start.

The interpreter is reached by replacing the kernels' functions: it is no option of the server.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.core.errors import ConfigError
from kernels_pallas import contract
from tests.device.fixture_models import FIXTURES
from tests.device.test_kv_codes import scored

LLAMA = FIXTURES / "tiny-llama3"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Triton's kernels, interpreted, with no refusal; counts how often each is traced."""
    traced: dict[str, int] = {}
    monkeypatch.setattr(contract, "triton_refusals", lambda *_, **__: [])
    for op in ("paged_decode", "paged_prefill", "kv_write"):
        module = importlib.import_module(f"kernels_pallas.{op}.triton")
        kernel = functools.partial(getattr(module, op), is_interpreted=True)

        def count(*arrays: Any, kernel: Any = kernel, op: str = op, **options: Any) -> Any:
            traced[op] = traced.get(op, 0) + 1
            return kernel(*arrays, **options)

        monkeypatch.setattr(module, op, count)
    return traced


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_triton_through_the_engine_gives_the_tokens_of_xla(interpreted: dict[str, int], tmp_path: Path) -> None:
    """One cache folder for both: an implementation is part of a program's key."""
    options = {"compilation_cache_dir": str(tmp_path / "programs")}
    expected, tokens, _ = scored(LLAMA, attention_backend="xla", **options)
    assert not interpreted
    got, same_tokens, _ = scored(LLAMA, attention_backend="triton", **options)
    assert interpreted.keys() == {"paged_decode", "paged_prefill", "kv_write"}
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
