"""Tokenizer folders, special tokens, bad words, and the model's own defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.core.config import ModelConfig
from jaxserve.core.errors import ConfigError, ModelError, RequestError
from jaxserve.text.folder import tokenizer_folder
from jaxserve.text.generation_config import default_params, eos_token_ids, to_params
from jaxserve.text.tokenizer import Tokenizer
from tests.text_fixtures import byte_level, sentencepiece, words


def write(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def config(**fields: object) -> ModelConfig:
    return ModelConfig(model="m", **fields)  # type: ignore[arg-type]


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    backend = byte_level()
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False) == "<|im_end|>"  # type: ignore[list-item]
    assert tokenizer.decode(tokenizer.encode("hello hello é 🎉")) == "hello hello é 🎉", "truncation must be off"


def test_tokens_that_only_the_config_knows() -> None:
    late, tool = {"content": "<late>", "special": False}, {"content": "<tool>", "special": True}
    config = {
        "eos_token": "<end>",
        "added_tokens_decoder": {"900": late, "3": tool},
        "additional_special_tokens": ["<extra>"],
    }
    tokenizer = Tokenizer(byte_level(), config)
    ids = tokenizer.encode("<end><late><extra><tool>x")
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "<late>x", "named and declared special tokens are skipped"
    assert "".join(map(tokenizer.detokenizer().feed, ids)) == "<late>x"
    assert tokenizer.eos_token_id == ids[0]


def test_lone_surrogate_is_the_clients_fault() -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        Tokenizer(byte_level()).encode("a\ud800")


def test_spaces_between_special_tokens() -> None:
    """Where a decoder joins tokens by spaces, added tokens in a row can go without."""
    tokenizer = Tokenizer(words(None))
    ids = [tokenizer.token_id(token) for token in ("<x>", "<y>", "a", "<x>")]
    for spaces, text in ((True, "<x> <y> a <x>"), (False, "<x><y> a <x>")):
        reader = tokenizer.detokenizer(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert "".join(map(reader.feed, ids)) == text  # type: ignore[arg-type]


def test_token_bytes() -> None:
    tokenizer = Tokenizer(sentencepiece())
    hello, byte = tokenizer.token_id("▁hello"), tokenizer.token_id("<0xC3>")
    assert (tokenizer.token_bytes(hello), tokenizer.token_bytes(byte)) == (b" hello", b"\xc3")  # type: ignore[arg-type]
    assert (tokenizer.token_text(hello), tokenizer.token_text(byte)) == (" hello", "\ufffd")  # type: ignore[arg-type]
    assert tokenizer.token_bytes(10_000) == b""


def test_bad_words_alone_and_after_a_space() -> None:
    tokenizer = Tokenizer(byte_level())
    plain, spaced = tokenizer.encode("hello"), tokenizer.encode(" hello")
    assert len(plain) == len(spaced) == 1
    assert tokenizer.encode_bad_words(["hello", " hello"]) == (tuple(plain), tuple(spaced))
    assert tokenizer.encode_bad_words(["xy"]) == (tuple(tokenizer.encode("xy")),), "three tokens after a space"


def test_tokenizer_of_another_folder(tmp_path: Path) -> None:
    assert tokenizer_folder(Path("model"), config()) == Path("model")
    assert tokenizer_folder(Path("model"), config(tokenizer=str(tmp_path))) == tmp_path


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}),
        ({"generation_config": "vllm"}, {}),
        ({"generation_config": "vllm", "override_generation_config": {"top_p": 0.5}}, {"top_p": 0.5}),
        ({"override_generation_config": {"temperature": 0.1}}, {"temperature": 0.1, "top_k": 20, "max_new_tokens": 9}),
    ],
)
def test_default_params(tmp_path: Path, fields: dict[str, object], expected: dict[str, object]) -> None:
    write(
        tmp_path,
        generation_config={"temperature": 0.6, "top_k": 20, "max_new_tokens": 9, "do_sample": True, "top_p": None},
    )
    assert default_params(tmp_path, config(**fields)) == expected


def test_defaults_from_another_folder(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(other, generation_config={"top_p": 0.3, "max_new_tokens": 5})
    defaults = default_params(tmp_path, config(generation_config=str(other)))
    assert (to_params(defaults).top_p, to_params(defaults).max_tokens) == (0.3, 5)
    with pytest.raises(ConfigError, match="neither auto"):
        default_params(tmp_path, config(generation_config=str(tmp_path / "nowhere")))


def test_bad_defaults_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'top_k'"):
        default_params(tmp_path, config(override_generation_config={"topk": 1}))
    write(tmp_path, generation_config={"temperature": 7})
    with pytest.raises(ConfigError, match=r"temperature must be in \[0, 2\]"):
        default_params(tmp_path, config())


def test_eos_of_every_source(tmp_path: Path) -> None:
    write(tmp_path, generation_config={"eos_token_id": [7, 3]}, config={"eos_token_id": 5})
    assert eos_token_ids(tmp_path, config(), 2) == (2, 3, 5, 7)
    assert eos_token_ids(tmp_path, config(generation_config="vllm", hf_overrides={"eos_token_id": 6}), None) == (
        3,
        6,
        7,
    )
    assert eos_token_ids(tmp_path, config(override_generation_config={"eos_token_id": 9}), 2) == (2, 3, 5, 7, 9)
