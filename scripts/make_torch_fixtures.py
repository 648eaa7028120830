"""Writes tests/fixtures/torch-bin: files of torch.save with the values that they hold, for the tests of our reader.

    python scripts/make_torch_fixtures.py       # needs torch and safetensors

Each NAME.bin has the same tensors, contiguous, in NAME.safetensors.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "torch-bin"


def cases() -> dict[str, dict[str, torch.Tensor]]:
    """File name to what is saved."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tied = torch.randn(5, 4)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    kinds = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.uint16, torch.bool, torch.float8_e4m3fn,
    )
    return {
        "dtypes": {str(kind).removeprefix("torch."): (torch.arange(6).reshape(2, 3) % 2).to(kind) for kind in kinds},
        "views": {
            "transposed": base.T, "inner": base[1:4, 2:5], "every_second": base[::2, ::3], "row": base[3],
            "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "embedding": tied, "head": tied,
        },
        "parameters": OrderedDict(
            (name, torch.nn.Parameter(value.detach())) for name, value in module.state_dict().items()
        ),
        "state_dict": module.state_dict(),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, tensors in cases().items():
        torch.save(tensors, FOLDER / f"{name}.bin")
        plain = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(plain, FOLDER / f"{name}.safetensors")
    torch.save({"a": torch.ones(2)}, FOLDER / "old_format.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
