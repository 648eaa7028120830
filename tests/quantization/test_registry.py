"""Which format a folder is in: config.json, files of older tools beside it, auto-round's names of layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.quantization.formats.registry import find_scheme

GPTQ = {"bits": 4, "group_size": 128, "desc_act": False}


@pytest.mark.parametrize(
    ("content", "method"),
    [
        ({"quant_method": "gptq", **GPTQ}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"), ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "squeezellm", "wbits": 4}, "squeezellm"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 64}, "gptq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 64}, "awq"),
    ],
)
def test_a_config_names_its_method(tmp_path: Path, content: dict[str, Any], method: str) -> None:
    scheme = find_scheme(tmp_path, {"quantization_config": content})
    assert scheme is not None and scheme.method == method


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", GPTQ, "gptq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq"),
        ("quant_config.json", {"wbits": 4}, "squeezellm"),
        ("quantize_config.json", {"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
    ],
)
def test_older_tools_wrote_a_file_beside(tmp_path: Path, file: str, content: dict[str, Any], method: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    scheme = find_scheme(tmp_path, {})
    assert scheme is not None and scheme.method == method


def test_plain_checkpoints_and_those_read_elsewhere_have_no_scheme(tmp_path: Path) -> None:
    assert find_scheme(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"quant_method": "quip"}, "quant_method 'quip'.*supported are gptq"),
        ({"novel": 1}, "quant_method None"), (GPTQ, "quant_method None"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}, "packing_format 'auto_round:exl"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, content: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        find_scheme(tmp_path, {"quantization_config": content})


def test_what_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantization_config is 'awq'"):
        find_scheme(tmp_path, {"quantization_config": "awq"})
    (tmp_path / "quant_config.json").write_text("{")
    with pytest.raises(ModelError, match="quant_config.json is not JSON"):
        find_scheme(tmp_path, {})
    (tmp_path / "quant_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"quant_config.json is \[\]"):
        find_scheme(tmp_path, {})
