"""Single values: bounds of every flag, sizes with suffixes, types from YAML; nothing is guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.flags.table import BY_NAME, FLAGS, Flag
from jaxserve.flags.values import convert

BOUNDED = [flag for flag in FLAGS if flag.low is not None]


@pytest.mark.parametrize("flag", BOUNDED, ids=lambda flag: flag.name)
def test_bounds_are_inclusive_and_named(flag: Flag) -> None:
    assert flag.low is not None and flag.high is not None
    assert convert(flag, flag.low) == flag.low and convert(flag, flag.high) == flag.high
    for beyond in (flag.low - 1, flag.high + 1):
        if str(beyond) not in flag.nothing:
            with pytest.raises(ConfigError) as raised:
                convert(flag, beyond)
            assert str(raised.value) == f"{flag.name} must be in [{flag.low}, {flag.high}], got {beyond}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096), ("8k", 8000), ("8K", 8192), ("1.5K", 1536), ("1m", 10**6), ("1M", 2**20), ("2g", 2 * 10**9),
        ("2G", 2**31), ("1T", 2**40), ("1KiB", 1024), ("3GiB", 3 * 2**30), ("2Mi", 2**21),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert convert(BY_NAME["kv-cache-memory-bytes"], text) == value


@pytest.mark.parametrize("text", ["", "8 k", "8kk", "K", "-1K", "1e3", "0x10", "8B", "1.5", "0.3k1", "١K1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="kv-cache-memory-bytes must be a number like 4096, 8k or 8K"):
        convert(BY_NAME["kv-cache-memory-bytes"], text)


@given(st.integers(1, 2**40))
def test_sizes_read_back(count: int) -> None:
    flag = BY_NAME["kv-cache-memory-bytes"]
    assert convert(flag, str(count)) == convert(flag, count) == count
    if count < 2**30:
        assert convert(flag, f"{count}K") == count * 1024


@pytest.mark.parametrize("raw", ["auto", "-1", -1])
def test_automatic_length(raw: object) -> None:
    assert convert(BY_NAME["max-model-len"], raw) is None


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("port", 8000.0, "port must be a whole number, got 8000.0"),
        ("port", True, "port must be a whole number, got True"),
        ("port", "8k", "port must be a whole number, got '8k'"),
        ("port", [1], "port must be a whole number, got [1]"),
        ("gpu-memory-utilization", "nan", "gpu-memory-utilization must be a number, got 'nan'"),
        ("gpu-memory-utilization", "inf", "gpu-memory-utilization must be a number, got 'inf'"),
        ("gpu-memory-utilization", True, "gpu-memory-utilization must be a number, got True"),
        ("revision", 83, "revision must be a text, got 83; put it in quotes"),
        ("revision", 1e5, "revision must be a text, got 100000.0; put it in quotes"),
        ("api-key", [123], "api-key must be a text, got 123; put it in quotes"),
        ("api-key", [], "api-key needs at least one value"),
        ("tokenizer", "", "tokenizer must be a text that is not empty"),
        ("enforce-eager", 1, "enforce-eager must be true or false, got 1"),
        ("enforce-eager", "yes", "enforce-eager must be true or false, got 'yes'"),
        ("dtype", "half", "dtype must be one of auto, bfloat16, float16, float32, got 'half'"),
        ("hf-overrides", [1], "hf-overrides must be a JSON object, got [1]"),
        ("hf-overrides", "5", "hf-overrides must be a JSON object, got 5"),
    ],
)
def test_wrong_types_are_named(name: str, raw: object, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        convert(BY_NAME[name], raw)
    assert message in str(raised.value)
