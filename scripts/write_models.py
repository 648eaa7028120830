"""Writes docs/models.md, the table of what is supported, from what the family tests showed when they ran.

    make docs        # runs tests/device/test_families.py, which calls `models_page` with its results
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from jaxserve.models.registry import FAMILIES

ROOT = Path(__file__).parents[1]
BACKENDS = {"cpu": "CPU", "gpu": "GPU"}
HEAD = """# Models

Class names as in `config.json`. A model of another class is refused with this list, and so is one of these whose
`config.json` has an attribute that is neither computed nor known to be harmless at its value.

Every row was shown by a test that ran on the backend it names: tiny random checkpoints made by transformers' own
classes, float32 logits of prompts (in chunks, past windows and first contexts) and of 16 decode steps through the paged
cache within 1e-4 of transformers' largest, greedy tokens equal; and the same parameters from every weights format.
`make docs` runs the tests and writes this page; the test suite fails when it is old.

| family | weights | backend | shown on | family file |
|---|---|---|---|---|
"""
TAIL = """
Lines count the whole file, which several families may share. [Adding a model](adding-a-model.md) says how a new one is
written.

Dynamic NTK rope is exact up to `max_position_embeddings`, which is the longest context then. LongRoPE switches as
transformers does: a sequence that outgrows the first context is computed anew with the long factors.

Refused by name for now: Gemma 4, Ministral 3, Llama 4, and models with recurrent state (Qwen3-Next, Granite 4,
Nemotron-H, LFM2); OPT-350M (norms after the sum).
"""


def models_page(records: Iterable[tuple[str, str, str, str]]) -> str:
    """The page for (family, checkpoint, weights format, backend) that tests showed."""
    records = list(records)
    lines = []
    for family in FAMILIES:
        of = [record for record in records if record[0] == family]
        if not of:
            continue
        checkpoints, weights, backends = (sorted({record[place] for record in of}) for place in (1, 2, 3))
        lines.append(
            f"| `{family}` | {', '.join(reversed(weights))} | {', '.join(BACKENDS[name] for name in backends)} "
            f"| {', '.join(checkpoints)} | {_file(family)} |\n"
        )
    return HEAD + "".join(lines) + TAIL


def _file(family: str) -> str:
    """Name and length of the file that holds a family."""
    path = Path(sys.modules[FAMILIES[family].spec.__module__].__file__ or "")
    return f"`{path.name}`, {len(path.read_text().splitlines())} lines"


def main() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/device/test_families.py", "--write-docs"]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
