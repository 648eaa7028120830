"""What quantised checkpoints take in their files and on the device, in bytes: the table of docs/quantization.md.

    python scripts/quantised_bytes.py FOLDER_OR_GGUF [...]

Loads each model on one device in bfloat16 and counts its arrays. "Stored" are the tensors, as the files have them,
of the modules that stay packed, "kept" the arrays that stand for them, by what they are. Parameters that are decoded
while they are loaded are in neither; how many there are is the last column. Ends with status 1 where the arrays are
not what was planned from the headers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.decoder import abstract_params
from jaxserve.models.hf import read_config
from jaxserve.models.registry import read_spec
from jaxserve.quantization.formats.registry import find_scheme
from jaxserve.quantization.packing import is_packed
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.folder import format_of, read_folder
from jaxserve.weights.loader import load_params, open_checkpoint
from jaxserve.weights.packed import decoded_count, plan
from jaxserve.weights.source import locate

MB = 1e6
PARTS = {"code_OC": "codes", "codes_OI": "codes", "scale_OG": "scales", "scale_O": "scales"}
HEADER = (
    "| checkpoint | stored | kept | codes | scales | zeros, tables and the like | kept / stored | decoded |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes of quantised checkpoints, in files and on the device.")
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    print(HEADER)
    for model in arguments.models:
        print(row(Path(model).stem if model.endswith(".gguf") else Path(model).name, locate(model)), flush=True)


def row(name: str, folder: Path) -> str:
    """One line of the table. Exits where arrays are not as planned."""
    spec, mesh = read_spec(folder), make_mesh(jax.devices()[:1])
    scheme = find_scheme(folder, read_config(folder), is_gguf=format_of(folder) == "gguf")
    if scheme is None:
        raise SystemExit(f"{folder} is not quantised")
    assemblies, files = open_checkpoint(spec, folder, scheme=scheme), read_folder(folder)
    packing = plan(spec, mesh, assemblies)
    tensors = (block.tensor for assembly in assemblies if assembly.path in packing for block in assembly.blocks)
    modules = dict.fromkeys(tensor.name.removesuffix(".weight") for tensor in tensors)
    names = [f"{module}{scheme.joint}{suffix}" for module in modules for suffix in scheme.suffixes]
    stored = sum(int(files[name].data.nbytes) for name in names if name in files)
    kept = by_part(load_params(spec, folder, mesh, jnp.bfloat16, scheme=scheme))
    planned = by_part(abstract_params(spec, jnp.bfloat16, mesh, packing))
    if kept != planned:
        raise SystemExit(f"{name}: kept are {dict(kept)} bytes, planned were {dict(planned)}")
    total = sum(kept.values())
    figures = [total, kept["codes"], kept["scales"], total - kept["codes"] - kept["scales"]]
    return (
        f"| {name} | {stored / MB:.2f} | " + " | ".join(f"{figure / MB:.2f}" for figure in figures)
        + f" | {total / stored:.3f} | {decoded_count(assemblies, packing)} |"
    )


def by_part(params: Any) -> Counter[str]:
    """Bytes of the packed matrices of a tree, by what an array is in them."""
    found: Counter[str] = Counter()
    for tensor in jax.tree.leaves(params, is_leaf=is_packed):
        if is_packed(tensor):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tensor):
                found[PARTS.get(getattr(path[-1], "name", ""), "beside")] += leaf.size * leaf.dtype.itemsize
    return found


if __name__ == "__main__":
    main()
