"""The text files of a model folder: finding them and reading them. Knows nothing of what they mean."""

from __future__ import annotations

import json
from pathlib import Path

from jaxserve.core.config import ModelConfig
from jaxserve.core.errors import ConfigError, ModelError

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def tokenizer_folder(folder: Path, config: ModelConfig, download_dir: str | None = None) -> Path:
    """Where the tokenizer is: the model's folder, or what `--tokenizer` names (a folder, or a name on the hub)."""
    if config.tokenizer is None or config.tokenizer == config.model:
        return folder
    if (local := Path(config.tokenizer).expanduser()).is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            config.tokenizer, token=config.hf_token, cache_dir=download_dir, allow_patterns=list(TEXT_FILES)
        )
    except Exception as error:  # the hub's errors have no common class: offline, no such name, no right to read it
        raise ConfigError(
            f"--tokenizer {config.tokenizer!r} is not a local folder and cannot be had from the hub "
            f"({type(error).__name__}): give a folder, or the name of one in the hub's cache"
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of a model folder; empty where there is no such file. Raises ModelError."""
    if path.exists() and not path.is_file():     # reading a pipe would wait for a writer
        raise ModelError(f"{path.name} is no regular file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value
