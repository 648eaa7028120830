"""Where a model's files are: a local folder, or a hub name that huggingface_hub finds in its cache or downloads.

Knows no jax and no file format, so the process that only needs the tokenizer may ask too.
Invariant: what `locate` returns is a folder with a config.json.
"""

from __future__ import annotations

from pathlib import Path

from jaxserve.core.errors import ModelError
from jaxserve.weights.gguf_model import model_folder

SMALL_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken",     # config, tokenizer, chat template
)
WEIGHT_FILES = {"safetensors": "*.safetensors", "pt": "pytorch_model*.bin"}
# Sub-folders hold other formats of the same model; "consolidated" is a second copy under other names.
IGNORED_FILES = ("*/*", "consolidated*", "*.gguf")


def locate(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    load_format: str = "auto",
) -> Path:
    """The folder of a model given by path or hub name; of a GGUF file one that is made for it.

    Downloads what is missing, with progress bars on stderr.

    Args:
      load_format: which weights to download; "auto": PyTorch's only where there are no safetensors; "dummy": none.
    """
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf":
        if not folder.is_file():
            raise ModelError(f"there is no file {model!r}")
        return model_folder(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the folder {model!r} has no config.json; it is not a Hugging Face model folder")
        return folder
    if not _is_hub_name(model):
        raise ModelError(f"there is no folder {model!r}, and it is not a hub name (like 'Qwen/Qwen2.5-3B-Instruct')")
    if load_format == "gguf":
        raise ModelError(
            f"load-format gguf: {model!r} is no folder, and repositories hold one model in many GGUF files; download "
            "one into a folder beside its config.json and tokenizer.json"
        )
    folder = _from_hub(model, revision, token, download_dir, [WEIGHT_FILES[name] for name in _formats(load_format)[:1]])
    for name in _formats(load_format)[1:]:
        if not any(folder.glob("*.safetensors")):
            folder = _from_hub(model, revision, token, download_dir, [WEIGHT_FILES[name]])
    if not (folder / "config.json").is_file():
        raise ModelError(f"the repository {model!r} has no config.json; it is not a model in Hugging Face's layout")
    return folder


def _formats(load_format: str) -> tuple[str, ...]:
    """Formats to look for, the preferred one first."""
    return {"auto": ("safetensors", "pt"), "dummy": ()}.get(load_format, (load_format,))


def _is_hub_name(model: str) -> bool:
    """ "name" or "owner/name", and not what people write for paths."""
    parts = model.split("/")
    return len(parts) <= 2 and all(part and part.strip(".") and not part.startswith("~") for part in parts)


def _from_hub(
    model: str, revision: str | None, token: str | None, download_dir: str | None, weights: list[str]
) -> Path:
    # Imported here: a local folder needs neither the package nor its import time.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model, revision=revision, token=token, cache_dir=download_dir, ignore_patterns=list(IGNORED_FILES),
                allow_patterns=[*SMALL_FILES, *weights],
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{model!r} is gated: accept its licence on the hub, then pass --hf-token (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is neither a folder nor a hub repository {model!r}; if it is private, pass --hf-token"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"there is no folder {model!r}, and it is not a hub name: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(_offline(model, download_dir)) from error
    except OSError as error:
        raise ModelError(f"downloading {model!r} failed: {error}. {_ways_out(download_dir)}") from error


def _offline(model: str, download_dir: str | None) -> str:
    return f"the hub cannot be reached and {model!r} is not in the cache. {_ways_out(download_dir)}"


def _ways_out(download_dir: str | None) -> str:
    cache = download_dir or "~/.cache/huggingface/hub, or where HF_HUB_CACHE says"
    return (
        "Two ways out: pass a local folder with config.json, tokenizer.json and weights as --model; or fill the "
        f"cache ({cache}) where there is a network, with `hf download MODEL`, and copy it here"
    )
