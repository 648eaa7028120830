"""Which models may draft for which: everything else is refused with what does not fit."""

import json
from dataclasses import replace

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.models.draft import check_draft, check_length
from tests.device.tiny import tiny_spec

SPEC = tiny_spec()


def check(draft, tmp_path, *, spec=SPEC):
    check_draft(spec, draft, folder=tmp_path / "a", draft_folder=tmp_path / "b")


def test_a_smaller_model_of_the_same_tokens_may_draft(tmp_path):
    check(replace(SPEC, layers=SPEC.layers[:1]), tmp_path)
    check_length(SPEC, SPEC.context_length)


def test_another_vocabulary_or_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="98 tokens.* 97"):
        check(replace(SPEC, vocab_size=98), tmp_path)
    for name, tokens in (("a", {"x": 0, "y": 1}), ("b", {"x": 0, "z": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    with pytest.raises(ConfigError, match="another tokenizer.*'y' is number None there, 1 here"):
        check(SPEC, tmp_path)


def test_windows_and_short_contexts_are_refused(tmp_path):
    for spec, draft in ((tiny_spec(window=6), SPEC), (SPEC, tiny_spec(window=6))):
        with pytest.raises(ConfigError, match="sliding windows"):
            check(draft, tmp_path, spec=spec)
    with pytest.raises(ConfigError, match="made for 64 positions.*reach 65.*--max-model-len 64"):
        check_length(SPEC, 65)
