"""From a command line to the configuration: every way to write a flag, what wins, what is refused and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxserve.core.config import EngineConfig, FrontendConfig, ServeConfig, SpeculativeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.flags import engine_config_from_kwargs, parse_serve_args
from jaxserve.flags.build import default
from jaxserve.flags.table import FLAGS, PARTS, Flag

# One legal value, other than the default, for every flag that wants one of its own.
SAMPLES = {
    "dtype": "float16", "quantization": "int8", "block-size": "32", "gpu-memory-utilization": "0.5",
    "scheduling-policy": "priority", "itl-target-ms": "50",
    "batching": "static",
    "load-format": "dummy", "logprobs-mode": "raw_logits", "generation-config": "vllm", "log-level": "debug",
    "tensor-parallel-size": "1", "root-path": "/prefix", "max-num-batched-tokens": "4K", "hf-overrides": '{"a": 1}',
    "override-generation-config": '{"top_p": 0.5}', "kv-cache-memory-bytes": "1G", "port": "8001",
    "nnodes": "1", "node-rank": "0", "kv-cache-dtype": "int8", "attention-backend": "xla",
    "quantization-backend": "xla",
}
OF_KIND = {"text": "word", "texts": "word", "int": "7", "length": "8K"}
SWITCHES = [flag for flag in FLAGS if flag.kind == "bool"]
VALUED = [flag for flag in FLAGS if flag.kind != "bool" and not flag.name.startswith("ssl")]   # TLS files must exist
DRAFTS = '{"method":"ngram","num_speculative_tokens":3}'
READ = {
    DRAFTS: SpeculativeConfig(num_speculative_tokens=3), "4K": 4096, "8K": 8192, "1G": 2**30, '{"a": 1}': {"a": 1},
    '{"top_p": 0.5}': {"top_p": 0.5},
}


def parse(line: str) -> ServeConfig:
    return parse_serve_args(line.split())


def held(config: ServeConfig, flag: Flag) -> object:
    part = config.frontend if flag.part == "frontend" else getattr(config.engine, flag.part)
    return getattr(part, flag.field)


def sample(flag: Flag) -> str:
    if flag.name == "speculative-config":
        return DRAFTS
    return SAMPLES.get(flag.name) or OF_KIND[flag.kind]


def expected(flag: Flag) -> object:
    text = sample(flag)
    if flag.kind == "texts":
        return (text,)
    if flag.kind in ("int", "float"):
        return float(text)
    return READ.get(text, text)


def test_every_field_has_its_flag_and_every_flag_its_field() -> None:
    parts = {field.name: field.type for field in dataclasses.fields(EngineConfig)}
    classes = {name: type(getattr(parse("m").engine, name)) for name in parts} | {"frontend": FrontendConfig}
    fields = {(part, field.name) for part, made in classes.items() for field in dataclasses.fields(made)}
    assert {(flag.part, flag.field) for flag in FLAGS} == fields
    assert set(PARTS) == set(classes)
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)


@pytest.mark.parametrize("flag", VALUED, ids=lambda flag: flag.name)
@pytest.mark.parametrize("form", ["--{} {}", "--{}={}"])
@pytest.mark.parametrize("underscores", [False, True])
def test_every_flag_reaches_its_field(flag: Flag, form: str, underscores: bool) -> None:
    name = flag.field if underscores else flag.name
    words = form.format(name, sample(flag).replace(" ", "")).split()
    config = parse_serve_args(words if flag.name == "model" else ["m", *words])
    assert held(config, flag) == expected(flag)


@pytest.mark.parametrize("flag", SWITCHES, ids=lambda flag: flag.name)
def test_every_switch_turns_on_and_off(flag: Flag) -> None:
    for words, value in (
        (f"--{flag.name}", True), (f"--{flag.field}", True), (f"--{flag.name}=true", True),
        (f"--no-{flag.name}", False), (f"--no_{flag.field}", False), (f"--{flag.name}=False", False),
        ("", default(flag.name)),
    ):
        assert held(parse(f"m {words}"), flag) is value, words


def test_both_tls_files_are_read_and_must_exist(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "cert"
    key.touch()
    with pytest.raises(ConfigError, match="ssl-certfile: there is no file"):
        parse(f"m --ssl-keyfile {key} --ssl-certfile {certificate}")
    certificate.touch()
    frontend = parse(f"m --ssl-keyfile {key} --ssl-certfile {certificate}").frontend
    assert (frontend.ssl_keyfile, frontend.ssl_certfile) == (str(key), str(certificate))
    with pytest.raises(ConfigError, match="go together"):
        parse(f"m --ssl-keyfile {key}")


def test_several_values() -> None:
    assert parse("m --api-key a b --port 9").frontend.api_key == ("a", "b")
    assert parse("m --api-key a --api-key b c").frontend.api_key == ("a", "b", "c")
    assert parse("m --served-model-name x y").frontend.served_model_name == ("x", "y")
    assert parse("--api-key=a m").frontend.api_key == ("a",)
    assert parse("m --api-key a -tp 1").frontend.api_key == ("a",)
    with pytest.raises(ConfigError, match="api-key takes every word up to the next flag, so put the model first"):
        parse("--api-key a m")


def test_the_last_of_a_repeated_flag_holds() -> None:
    assert parse("m --port 1 --port 2").frontend.port == 2


def test_json_whole_and_by_entry() -> None:
    config = parse('m --hf-overrides {"a":{"b":1}} --hf-overrides.a.c 2 --hf_overrides.d=text')
    assert config.engine.model.hf_overrides == {"a": {"b": 1, "c": 2}, "d": "text"}
    config = parse('m --hf-overrides.rope_scaling {"factor":8.0}')
    assert config.engine.model.hf_overrides == {"rope_scaling": {"factor": 8.0}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hf-overrides [1]", "hf-overrides must be a JSON object, got [1]"),
        ("--hf-overrides {a", "hf-overrides must be a JSON object, got '{a'"),
        ("--hf-overrides [1] --hf-overrides.a 1", "hf-overrides must be a JSON object, got '[1]'"),
        ("--hf-overrides.a 1 --hf-overrides.a.b 2", "'a.b' goes into 'a', which holds 1"),
        ("--hf-overrides..a 1", "a dot and a name follow flags that take a JSON object"),
        ("--port.a 1", "a dot and a name follow flags that take a JSON object"),
        ("--modle x", "unknown flag '--modle'; did you mean '--model'?"),
        ("--no-enable-prefix-cachin", "did you mean '--no-enable-prefix-caching'?"),
        ("--zzzzzzzz", "unknown flag '--zzzzzzzz'; see `jaxserve serve --help`"),
        ("-x", "unknown flag '-x'"),
        ("--no-port", "unknown flag '--no-port': --port takes a value"),
        ("--no-enforce-eager=true", "no-enforce-eager takes no value"),
        ("--enforce-eager=maybe", "enforce-eager must be true or false, got 'maybe'"),
        ("--enforce-eager false", "write a switch as --flag, --no-flag or --flag=false"),
        ("n", "'n' is one word too many: the model is 'm' already"),
        ("--model n", "the model is named twice: 'm', and --model 'n'"),
        ("--port", "port needs a value"),
        ("--port --host x", "port needs a value"),
        ("--api-key", "api-key needs at least one value"),
        ("--api-key --port 3", "api-key needs at least one value"),
        ("--host=", "host must be a text that is not empty"),
        ("--config a.yaml --config b.yaml", "config is given twice"),
        ("--uds /s --port 8000", "port has no effect with uds"),
        ("--uds /s --host x", "host has no effect with uds"),
        ("--skip-tokenizer-init --tokenizer t", "tokenizer has no effect with skip-tokenizer-init"),
        ("--skip-tokenizer-init --chat-template t", "chat-template has no effect with skip-tokenizer-init"),
        ("--tensor-parallel-size 0", "tensor-parallel-size must be"),
        ("-tp=5000", "tensor-parallel-size must be"),
        ("--block-size 24", "block-size must be a power of two, got 24; use 16"),
        ("--max-num-seqs 64 --max-num-batched-tokens 32", "max-num-batched-tokens 32 is less than max-num-seqs 64"),
        ("--generation-config nowhere", "generation-config must be auto, vllm or a folder"),
        ("--root-path x", "root-path must start with '/', got 'x'"),
    ],
)
def test_refusals_name_the_value_and_the_way_out(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f"m {words}")
    assert message in str(raised.value)


def test_a_server_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="model is missing"):
        parse("--port 1")


def test_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    assert parse("m").frontend.api_key == ("secret",)
    assert parse("m --api-key other").frontend.api_key == ("other",)
    monkeypatch.setenv("JAXSERVE_API_KEY", "")
    assert parse("m").frontend.api_key == ()


def test_offline_arguments() -> None:
    config = engine_config_from_kwargs(
        "m", dtype="float32", max_model_len="8K", hf_overrides={"a": 1}, enforce_eager=True, seed=None,
        chat_template="t",
    )
    assert (config.model.model, config.model.dtype, config.model.max_model_len) == ("m", "float32", 8192)
    assert config.model.hf_overrides == {"a": 1} and config.compilation.enforce_eager and config.model.seed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_modle_len": 1}, "unknown argument 'max_modle_len'; did you mean 'max_model_len'?"),
        ({"port": 1}, "port is about the HTTP server"),
        ({"log_level": "debug"}, "log_level is about the HTTP server"),
        ({"no_enforce_eager": True}, "write enforce_eager=False"),
        ({"enable_lora": True}, "enable_lora: LoRA is not built yet"),
        ({"max_model_len": True}, "max-model-len must be a whole number, got True"),
        ({"dtype": 32}, "dtype must be a text, got 32"),
        ({"tensor_parallel_size": 0}, "tensor-parallel-size must be"),
    ],
)
def test_offline_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        engine_config_from_kwargs("m", **options)
    assert message in str(raised.value)
