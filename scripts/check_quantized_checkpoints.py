"""Every matrix of `make_quantized_checkpoints.py`'s folders as jaxserve reads it, beside what the tool made of it.

    python scripts/check_quantized_checkpoints.py OUT

Prints a line a checkpoint; ends with status 1 where a matrix is another. The tool's own weights are of 16 bits where it
computes in those, so ours are rounded to them before they are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from jaxserve.models.hf import read_config
from jaxserve.quantization.formats.registry import find_scheme
from jaxserve.weights.folder import read_folder
from jaxserve.weights.packed import PackedMatrix, with_packed

FEW = 0.001     # of the elements may be the neighbouring number: tools round scales once more, or not
ROUNDING = 1e-6     # of the largest weight: float32 in another order of multiplication


def main() -> None:
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if Path(f"{path}-plain").is_dir())
    if not folders:
        sys.exit(f"{sys.argv[1]} has no checkpoints; make_quantized_checkpoints.py makes them")
    is_right = [check(folder, Path(f"{folder}-plain")) for folder in folders]
    sys.exit(0 if all(is_right) else 1)


def check(folder: Path, plain: Path) -> bool:
    """Whether all matrices are the tool's."""
    scheme = find_scheme(folder, read_config(folder))
    assert scheme is not None, f"{folder} is not quantised"
    tool, matrices, elements, others, worst = read_folder(plain), 0, 0, 0, 0.0
    for name, tensor in with_packed(read_folder(folder), scheme).items():
        if isinstance(tensor.data, PackedMatrix):
            expected = tool[name].data
            found = tensor.data.codes().dequantised()
            apart = np.abs(found - expected.astype(np.float32)) / np.abs(expected.astype(np.float32)).max()
            others += int(((found.astype(expected.dtype) != expected) & (apart > ROUNDING)).sum())
            worst = max(worst, float(apart.max()))
            matrices, elements = matrices + 1, elements + found.size
    print(
        f"{folder.name:16} {scheme.method:18} {matrices} matrices; {others} of {elements} elements are another "
        f"{expected.dtype.name}; largest difference {worst:.1e} of the largest weight"
    )
    return matrices > 0 and others <= FEW * elements


if __name__ == "__main__":
    main()
