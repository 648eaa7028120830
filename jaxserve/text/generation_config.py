"""What a model's authors advise: sampling defaults and end-of-sequence ids, from the files of its folder.

Order: request > --override-generation-config > generation_config.json > OpenAI's defaults. Knows no tokenizer.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from jaxserve.core.config import ModelConfig
from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.core.sampling_params import STOP_TOKENS_MAX, SamplingParams
from jaxserve.text.folder import read_json

ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_EOS = "eos_token_id"


def default_params(folder: Path, config: ModelConfig) -> dict[str, object]:
    """Sampling parameters in effect where a request says nothing; `max_new_tokens` also caps what one asks for.

    `--generation-config`: "auto" reads the model's folder, "vllm" reads nothing, anything else is a folder.
    Raises ConfigError for an unknown name or a value out of bounds.
    """
    for name in config.override_generation_config:
        if name not in (*ADVISED, _EOS):
            near = difflib.get_close_matches(name, ADVISED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may hold {', '.join((*ADVISED, _EOS))}"
            raise ConfigError(f"--override-generation-config: unknown key {name!r}; {hint}")
    advised = {} if config.generation_config == "vllm" else _read(folder, config)
    merged = {**advised, **config.override_generation_config}
    defaults = {name: merged[name] for name in ADVISED if merged.get(name) is not None}
    try:
        to_params(defaults)
    except RequestError as error:
        raise ConfigError(
            f"the model's sampling defaults are not valid: {error} Set it with --override-generation-config, "
            "or use --generation-config vllm."
        ) from error
    return defaults


def to_params(defaults: Mapping[str, object]) -> SamplingParams:
    """The defaults as parameters, for who gives none. Raises RequestError for a value out of bounds."""
    named = {"max_tokens" if name == "max_new_tokens" else name: value for name, value in defaults.items()}
    return SamplingParams(**named)  # type: ignore[arg-type]


def eos_token_ids(folder: Path, config: ModelConfig, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Every id that ends an output: of generation_config.json, config.json and the tokenizer, ascending."""
    sources = [
        config.override_generation_config.get(_EOS),
        _read(folder, config).get(_EOS),
        (read_json(folder / "config.json") | config.hf_overrides).get(_EOS),
        tokenizer_eos,
    ]
    ids: set[int] = set()
    for source in sources:
        values = source if isinstance(source, (list, tuple)) else [source]
        ids.update(value for value in values if isinstance(value, int) and value >= 0)
    if len(ids) > STOP_TOKENS_MAX:
        raise ConfigError(f"{_EOS} names {len(ids)} ids, at most {STOP_TOKENS_MAX} may end an output")
    return tuple(sorted(ids))


def _read(folder: Path, config: ModelConfig) -> dict[str, object]:
    """generation_config.json of the model's folder, or of the one the operator names."""
    if config.generation_config in ("auto", "vllm"):
        return read_json(folder / "generation_config.json")
    other = Path(config.generation_config).expanduser()
    path = other / "generation_config.json" if other.is_dir() else other
    if not path.is_file():
        raise ConfigError(
            f"--generation-config {config.generation_config!r} is neither auto, vllm nor a folder with "
            "generation_config.json"
        )
    return read_json(path)
