"""YAML files: names of keys, where files are found, precedence, refusals; the shipped ones all load."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.flags import parse_serve_args
from jaxserve.flags.config_file import read_config
from jaxserve.flags.table import BY_NAME

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_keys_with_dashes_or_underscores(here: Path) -> None:
    (here / "a.yaml").write_text(
        "model: m\nmax-model-len: 8K\nblock_size: 32\napi-key: [a, b]\nserved-model-name: one\n"
        "hf-overrides:\n  rope: {factor: 2.0}\nno-enable-prefix-caching: true\nenforce-eager: true\ntokenizer: null\n"
    )
    config = parse_serve_args(["--config", "a.yaml"])
    assert config.engine.model.max_model_len == 8192 and config.engine.cache.block_size == 32
    assert config.frontend.api_key == ("a", "b") and config.frontend.served_model_name == ("one",)
    assert config.engine.model.hf_overrides == {"rope": {"factor": 2.0}}
    assert not config.engine.cache.enable_prefix_caching and config.engine.compilation.enforce_eager
    assert config.engine.model.tokenizer is None


def test_flag_beats_file_beats_default(here: Path) -> None:
    (here / "a.yml").write_text("model: from-file\nport: 1\nseed: 5\napi-key: [a]\nasync-scheduling: false\n")
    config = parse_serve_args(["word", "--config=a.yml", "--port", "2", "--api-key", "b", "--async-scheduling"])
    assert config.engine.model.model == "word" and config.frontend.port == 2 and config.engine.model.seed == 5
    assert config.frontend.api_key == ("b",) and config.engine.scheduler.async_scheduling
    assert config.frontend.host == "0.0.0.0"
    assert parse_serve_args(["--config", "a.yml", "--model", "flag"]).engine.model.model == "flag"


def test_a_bare_name_is_looked_up_here_then_among_the_shipped(here: Path) -> None:
    assert read_config("qwen3b.yaml")["model"] == "Qwen/Qwen2.5-3B-Instruct"
    (here / "qwen3b.yaml").write_text("model: mine\n")
    assert read_config("qwen3b.yaml")["model"] == "mine"
    with pytest.raises(ConfigError, match="there is no config './smollm2-135m.yaml'"):
        read_config("./smollm2-135m.yaml")
    shipped = r"among the shipped ones \(gemma3-4b.yaml, .*qwen3b.yaml, smollm2-135m.yaml\)"
    with pytest.raises(ConfigError, match=shipped):
        read_config("nope.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path, here: Path) -> None:
    config = parse_serve_args(["--config", path.name, *([] if "\nmodel:" in path.read_text() else ["m"])])
    raw = read_config(path.name)
    assert raw and set(raw) <= set(BY_NAME)
    assert config.engine.model.dtype == "bfloat16" and config.frontend.served_model_name
    assert path.read_text().startswith("# "), "a shipped config says what it is for"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocksize: 16", "unknown key 'blocksize'; did you mean 'block-size'?"),
        ("port: 1\nport: 2", "the key 'port' is given twice"),
        ("hf-overrides: {a: 1, a: 2}", "the key 'a' is given twice"),
        ("block-size: 16\nblock_size: 32", "has 'block-size' twice"),
        ("enforce-eager: true\nno-enforce-eager: true", "has 'enforce-eager' twice"),
        ("no-enforce-eager: 3", "no-enforce-eager must be true or false, got 3"),
        ("port:", "port has no value in config 'a.yaml'"),
        ("port: high", "port must be a whole number, got 'high'"),
        ("port: 70000", "port must be in [1, 65535], got 70000"),
        ("revision: 0123", "revision must be a text, got 83; put it in quotes"),
        ("enable-lora: true", "enable-lora: LoRA is not built yet"),
        ("config: b.yaml", "unknown key 'config'"),
        ("- port", "must be a table of flags"),
        ("port", "must be a table of flags"),
        ("port: [1", "cannot be read as YAML"),
        ("port: !!python/object:os.system x", "cannot be read as YAML"),
        ("yes: 1", "unknown key 'True'"),
    ],
)
def test_refusals(here: Path, text: str, message: str) -> None:
    (here / "a.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError) as raised:
        parse_serve_args(["m", "--config", "a.yaml"])
    assert message in str(raised.value)


def test_files_that_are_no_yaml(here: Path) -> None:
    (here / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_config("a.yaml")
    (here / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="there is no config"):
        read_config("folder.yaml")
    with pytest.raises(ConfigError, match=r"must be a \.yaml file"):
        read_config("a.json")


def test_an_empty_file_is_all_defaults(here: Path) -> None:
    (here / "a.yaml").write_text("# nothing\n")
    assert parse_serve_args(["m", "--config", "a.yaml"]) == parse_serve_args(["m"])
