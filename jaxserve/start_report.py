"""The one table a start prints: what is served, where the memory went, what was compiled and how long it all took."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

LOG_WIDTH = 140   # where stderr is no terminal

@dataclass(frozen=True, kw_only=True, slots=True)
class StartReport:
    """Everything in bytes and seconds; `seconds` by phase, in order."""

    model: str
    family: str
    parameter_count: int
    dtype: str
    devices: str
    mesh: str
    weight_bytes: int
    temporary_bytes: int
    pools: tuple[tuple[str, int, str], ...]     # of KV pages: name, bytes, sizes for people
    concurrency: float                          # sequences of full length that fit at once
    max_model_len: int
    row_count: int
    tokens_max: int
    buckets: str
    compiled: str
    attention: str = ""                         # the kernels that were named, or proved right and fastest here
    quantization: str = ""                      # how weights are packed, and how many
    draft: str = ""                             # the draft model and its share of weights and pages
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        spent = " · ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        return [
            ("model", f"{self.model} ({self.family}, {self.parameter_count / 1e6:,.1f} M parameters, {self.dtype})"),
            ("devices", f"{self.devices}, mesh {self.mesh}"),
            ("weights", size(self.weight_bytes) + (f" ({self.quantization})" if self.quantization else "")),
            *([("attention", self.attention)] if self.attention else []),
            ("step temporaries", size(self.temporary_bytes)),
            *((name, f"{size(count)}: {sizes}") for name, count, sizes in self.pools),
            *([("draft model", self.draft)] if self.draft else []),
            ("maximum concurrency", f"{self.concurrency:.1f} sequences of {self.max_model_len:,} tokens"),
            ("a step holds", f"up to {self.tokens_max:,} tokens of up to {self.row_count} sequences"),
            ("buckets", self.buckets),
            ("programs", self.compiled),
            ("seconds", f"{spent} · total {sum(self.seconds.values()):.1f}"),
        ]

    def print(self) -> None:
        """To stderr."""
        table = Table(title="jaxserve", title_justify="left", box=SIMPLE, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows():
            table.add_row(name, value)
        Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH).print(table)


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"
