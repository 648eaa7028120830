"""Which files of a model folder are its weights: one file, an index over several, or all there are; in which format.

Knows names of files and the readers; no byte of a format. Invariant: every tensor comes from exactly one file, and
an index and its files say the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxserve.core.errors import WeightsError
from jaxserve.weights import gguf_names, safetensors, torch_bin
from jaxserve.weights.files import StoredTensor, map_file, without_duplicates
from jaxserve.weights.gguf_model import pointed_file

LoadFormat = Literal["auto", "safetensors", "pt", "gguf"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """How one format's files are called, and who reads one."""

    single: str
    index: str
    pattern: str
    read_file: Callable[[Path], dict[str, StoredTensor]]
    lone: str | None = None     # what a single file may be called where none fits the pattern

    def is_in(self, folder: Path) -> bool:
        """Anything of that name counts, also what is no file: it is refused by its name, not passed over."""
        return any(os.path.lexists(folder / name) for name in (self.index, self.single)) or bool(self.files(folder))

    def files(self, folder: Path) -> list[Path]:
        """The files of a folder without an index."""
        if os.path.lexists(folder / self.single):
            return [folder / self.single]
        found = sorted(folder.glob(self.pattern))
        lone = [] if found or self.lone is None else list(folder.glob(self.lone))
        return lone if len(lone) == 1 else found


FORMATS: dict[str, _Format] = {
    "safetensors": _Format(
        single="model.safetensors", index="model.safetensors.index.json", pattern="*.safetensors",
        read_file=safetensors.read_file,
    ),
    # Only this pattern: trainers leave "training_args.bin" and "optimizer.bin" beside the weights. SqueezeLLM's folders
    # have one file named after the model, "sq-llama-2-7b-w4-s0.pt".
    "pt": _Format(
        single="pytorch_model.bin", index="pytorch_model.bin.index.json", pattern="pytorch_model*.bin",
        read_file=torch_bin.read_file, lone="*.pt",
    ),
    "gguf": _Format(
        single="model.gguf", index="model.gguf.index.json", pattern="*.gguf", read_file=gguf_names.read_checkpoint
    ),
}


def format_of(folder: Path, load_format: LoadFormat = "auto") -> str:
    """The format that a folder is read in. "auto" takes safetensors where there are any, else PyTorch's, else GGUF."""
    if pointed_file(folder) is not None and load_format in ("auto", "gguf"):
        return "gguf"
    names = tuple(FORMATS) if load_format == "auto" else (load_format,)
    there = [name for name in names if FORMATS[name].is_in(folder)]
    if not there:
        patterns = " nor ".join(FORMATS[name].pattern for name in names)
        other = next((name for name in FORMATS if FORMATS[name].is_in(folder)), None)
        raise WeightsError(
            f"the model's folder has neither {patterns}" if len(names) > 1 else
            f"the model's folder has no {patterns}" + (f"; pass --load-format {other}" if other else "")
        )
    return there[0]


def read_folder(folder: Path, load_format: LoadFormat = "auto") -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, by name."""
    form = FORMATS[format_of(folder, load_format)]
    if (pointed := pointed_file(folder)) is not None:
        return form.read_file(pointed)
    if os.path.lexists(folder / form.index):
        return _read_indexed(folder, form)
    # A folder may also hold the same model under other names ("consolidated.safetensors") or adapters.
    tensors: dict[str, StoredTensor] = {}
    for path in form.files(folder):
        for name, tensor in form.read_file(path).items():
            if name in tensors:
                raise WeightsError(
                    f"tensor {name!r} is in both {tensors[name].file} and {tensor.file}, and there is no {form.index} "
                    "that says which one counts; remove the files that do not belong to the model"
                )
            tensors[name] = tensor
    return tensors


def _read_indexed(folder: Path, form: _Format) -> dict[str, StoredTensor]:
    """Exactly the tensors that the index lists, from the files that it names."""
    place = _read_index(folder / form.index)
    files: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(place.values())):
        # Only plain names: the index must not reach outside the folder it came with.
        if file != Path(file).name or file in ("", ".", "..") or "\0" in file:
            raise WeightsError(f"{form.index} points outside its folder: {file[:120]!r}")
        if not os.path.lexists(folder / file):
            raise WeightsError(f"{form.index} names {file!r}, which is missing; the download is incomplete")
        files[file] = form.read_file(folder / file)
    for file, found in files.items():
        for name in found:
            if place.get(name) != file:
                raise WeightsError(f"tensor {name!r} of {file} is {_elsewhere(place.get(name))} {form.index}")
    for name, file in place.items():
        if name not in files[file]:
            raise WeightsError(f"{form.index} says that tensor {name!r} is in {file!r}; it is not")
    return {name: files[file][name] for name, file in place.items()}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name."""
    try:
        place = json.loads(bytes(map_file(path)), object_pairs_hook=without_duplicates)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path.name} is not an index of weight files: {error}") from error
    if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
        raise WeightsError(f"{path.name}: 'weight_map' must map tensor names to file names")
    return place


def _elsewhere(file: str | None) -> str:
    return "not listed in" if file is None else f"placed in {file!r} by"
