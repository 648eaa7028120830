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
    page_count: int
    page_size: int
    page_bytes: int
    max_model_len: int
    row_count: int
    tokens_max: int
    buckets: str
    compiled: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def token_capacity(self) -> int:
        """Tokens whose keys and values fit the pool."""
        return self.page_count * self.page_size

    @property
    def concurrency(self) -> float:
        """Sequences of full length that fit at once."""
        return self.token_capacity / self.max_model_len

    def rows(self) -> list[tuple[str, str]]:
        pages = f"{self.page_count:,} pages x {self.page_size} = {self.token_capacity:,} tokens"
        spent = " · ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        return [
            ("model", f"{self.model} ({self.family}, {self.parameter_count / 1e6:,.1f} M parameters, {self.dtype})"),
            ("devices", f"{self.devices}, mesh {self.mesh}"),
            ("weights", size(self.weight_bytes)),
            ("step temporaries", size(self.temporary_bytes)),
            ("KV cache", f"{size(self.page_count * self.page_bytes)}: {pages}"),
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
