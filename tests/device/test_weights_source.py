"""Where a model's files are found: folders, the hub's cache, and what is said when there is neither."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.core.errors import ModelError
from jaxserve.weights.source import SMALL_FILES, locate
from tests.device.fixture_models import FIXTURES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(download_dir: Path, name: str = "models--someone--tiny") -> Path:
    """A snapshot as huggingface_hub lays it out."""
    folder = download_dir / name / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    refs = download_dir / name / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return folder


def offline(code: str) -> str:
    """Runs code in a process whose hub is a closed port; offline mode must be set before the package is imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def test_a_folder_is_itself() -> None:
    assert locate(str(FIXTURES / "tiny-qwen2")) == FIXTURES / "tiny-qwen2"


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        locate(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "../nothing", "~/nothing-here", "a/b/c", ""])
def test_paths_that_do_not_exist_never_reach_the_hub(model: str) -> None:
    with pytest.raises(ModelError, match=r"there is no folder|has no config\.json"):
        locate(model)


def test_offline_uses_the_cache(tmp_path: Path) -> None:
    folder = cached(tmp_path)
    code = f"from jaxserve.weights.source import locate; print(locate('someone/tiny', download_dir={str(tmp_path)!r}))"
    assert offline(code).strip().splitlines()[-1] == str(folder)


def test_offline_without_the_cache_names_both_ways_out(tmp_path: Path) -> None:
    code = (
        "from jaxserve.core.errors import ModelError\n"
        "from jaxserve.weights.source import locate\n"
        "try:\n"
        f"    locate('someone/other', download_dir={str(tmp_path)!r})\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    said = offline(code)
    assert "'someone/other' is not in the cache" in said and "local folder" in said and str(tmp_path) in said


def test_locating_imports_no_jax() -> None:
    code = "import sys, jaxserve.weights.source; print([m for m in ('jax', 'huggingface_hub') if m in sys.modules])"
    assert offline(code).strip() == "[]"


@pytest.mark.parametrize(
    ("load_format", "on_hub", "asked"),
    [
        ("auto", "model.safetensors", ["*.safetensors"]),
        ("auto", "pytorch_model.bin", ["*.safetensors", "pytorch_model*.bin"]),
        ("safetensors", "pytorch_model.bin", ["*.safetensors"]),
        ("pt", "model.safetensors", ["pytorch_model*.bin"]),
        ("dummy", "model.safetensors", []),
    ],
)
def test_only_the_weights_that_are_read_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str, on_hub: str, asked: list[str]
) -> None:
    wanted: list[str] = []

    def snapshot_download(model: str, *, allow_patterns: list[str], **_: object) -> str:
        (tmp_path / "config.json").touch()
        wanted.extend(weights := [pattern for pattern in allow_patterns if pattern not in SMALL_FILES])
        if any(fnmatch.fnmatch(on_hub, pattern) for pattern in weights):
            (tmp_path / on_hub).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate("someone/tiny", load_format=load_format) == tmp_path
    assert wanted == asked
