"""Writes the table of docs/quantization.md, what is supported, from what the tests of quantised checkpoints showed.

    make docs        # runs tests/device/test_quantised_checkpoints.py, which calls `with_table` with its results
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quantization.md"
BEGIN, END = "<!-- shown by tests: begin -->", "<!-- shown by tests: end -->"
HEADER = (
    "| checkpoint | `quant_method` | kept as | bits a weight | rows | bfloat16 rows on CPUs | on GPUs |\n"
    "|---|---|---|---|---|---|---|"
)
ACTIVATIONS = {
    "none": "as they are", "token": "rounded by token", "group": "rounded by token and group",
    "static": "rounded by a stored scale",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One checkpoint that a test showed; products are who multiplies."""

    kind: str
    method: str
    code: str
    activations: str
    bits: float
    cpu: str
    gpu: str


def with_table(text: str, shown: Iterable[Shown]) -> str:
    """The page with the table of these checkpoints."""
    rows = [
        f"| {one.kind} | `{one.method}` | {one.code} | {one.bits:g} | {ACTIVATIONS[one.activations]} | {one.cpu} "
        f"| {one.gpu} |" for one in shown
    ]
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return head + "\n".join([BEGIN, HEADER, *rows, END]) + tail


def main() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/device/test_quantised_checkpoints.py", "--write-docs"]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
