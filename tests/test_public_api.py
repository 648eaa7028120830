"""What users import: names, their shapes, and that importing is light and leaves out the server."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(__file__).parents[1]


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    tail = "; import sys; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_public_names() -> None:
    assert jaxserve.__all__ == ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]
    for name in jaxserve.__all__:
        assert getattr(jaxserve, name) is not None and name in dir(jaxserve)
    with pytest.raises(AttributeError, match="no attribute 'LLLM'"):
        _ = jaxserve.LLLM


def test_the_stub_names_the_same() -> None:
    stub = (ROOT / "jaxserve" / "__init__.pyi").read_text(encoding="utf-8")
    assert set(re.findall(r" as (\w+)$|^(\w+):", stub, re.MULTILINE)) == {
        (name, "") if name != "__version__" else ("", name) for name in jaxserve.__all__
    }


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == jaxserve.__version__
    assert f"## {jaxserve.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_call_shapes_of_vllm() -> None:
    generate = list(inspect.signature(jaxserve.LLM.generate).parameters)
    chat = list(inspect.signature(jaxserve.LLM.chat).parameters)
    assert generate[:3] == ["self", "prompts", "sampling_params"] and "use_tqdm" in generate
    assert chat[:3] == ["self", "messages", "sampling_params"] and "use_tqdm" in chat
    assert {"request_id", "prompt", "prompt_token_ids", "outputs", "finished"} <= field_names(jaxserve.RequestOutput)
    assert {"index", "text", "token_ids", "logprobs", "finish_reason", "stop_reason"} <= field_names(
        jaxserve.CompletionOutput
    )
    assert {"temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "seed", "n", "logprobs"} <= field_names(
        jaxserve.SamplingParams
    )


def field_names(made: type) -> set[str]:
    return set(inspect.signature(made).parameters)


def test_importing_the_package_is_light() -> None:
    assert not modules_after("import jaxserve") & {"jax", "numpy", "fastapi", "pydantic", "flax"}
    assert "jax" not in modules_after("from jaxserve import SamplingParams; SamplingParams()")


def test_the_offline_engine_leaves_the_server_out() -> None:
    assert not modules_after("from jaxserve import LLM") & {"fastapi", "uvicorn", "starlette", "prometheus_client"}


def test_kernels_are_usable_alone() -> None:
    loaded = modules_after("import kernels_pallas, kernels_pallas.contract, kernels_pallas.paged_decode.api")
    assert "jax" in loaded and not loaded & {"jaxserve", "flax"}
