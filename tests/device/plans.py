"""Builds step plans by hand and drives a runner with them; keeps pages and lengths as a scheduler would.

Pages are handed out in a scattered order, so that a mix-up of page and index never goes unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.core.plan import (
    PageUpdates,
    PendingStep,
    RowAdmission,
    RunnerPort,
    StepPlan,
    StepResult,
)
from jaxserve.core.sampling_params import SamplingParams


@dataclass
class Entry:
    """One scheduled sequence: `tokens` are computed, or None for the row's own newest sample."""

    row: int
    tokens: Sequence[int] | None = None
    samples: bool = True
    targets: Sequence[int] | None = None


@dataclass
class Held:
    """What the driver knows of a row."""

    length: int = 0
    pages: list[list[int]] = field(default_factory=list)


class Driver:
    """Turns entries into plans and launches them."""

    def __init__(self, runner: RunnerPort, seed: int = 0) -> None:
        self.runner, self.step = runner, 0
        shape = runner.shape
        rng = np.random.default_rng(seed)
        self.free = [list(rng.permutation(group.page_count)) for group in shape.groups]
        self.rows: dict[int, Held] = {}
        self._admissions: dict[int, dict[str, object]] = {}

    def admit(
        self, row: int, prompt: Sequence[int], params: SamplingParams | None = None, *, known: Sequence[int] = (),
        seed: int = 0, choice: int = 0, slot: int = -1, stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        """The row is admitted with its first entry; `known` is output that a resumed sequence has already."""
        self.release(row)
        self.rows[row] = Held(pages=[[] for _ in self.free])
        self._admissions[row] = {
            "row": row, "params": params or SamplingParams(temperature=0), "seed": seed, "choice": choice,
            "prompt_length": len(prompt), "token_ids": np.array([*prompt, *known], np.int32), "slot": slot,
            "stop_token_ids": stop_token_ids,
        }

    def release(self, row: int) -> None:
        held = self.rows.pop(row, None)
        for free, pages in zip(self.free, held.pages if held else (), strict=False):
            free.extend(pages)

    def launch(self, *entries: Entry) -> PendingStep:
        return self.runner.launch(self.plan(*entries))

    def run(self, *entries: Entry) -> StepResult:
        return self.launch(*entries).result()

    def plan(self, *entries: Entry) -> StepPlan:
        """Decodes must come first."""
        admissions, grown = [], [[] for _ in self.free]
        starts = []
        for entry in entries:
            held = self.rows[entry.row]
            count = 1 if entry.tokens is None else len(entry.tokens)
            starts.append(held.length)
            held.length += count
            needed = -(-held.length // self.runner.shape.page_size)
            for group, pages in enumerate(held.pages):
                while len(pages) < needed:
                    page = int(self.free[group].pop())
                    if entry.row not in self._admissions:
                        grown[group].append((entry.row, len(pages), page))
                    pages.append(page)
            if entry.row in self._admissions:
                fields = self._admissions.pop(entry.row)
                pages = tuple(np.array(pages, np.int32) for pages in held.pages)
                admissions.append(RowAdmission(pages=pages, **fields))  # type: ignore[arg-type]
        tokens = [[0] if entry.tokens is None else list(entry.tokens) for entry in entries]
        targets = [entry.targets or [-1] * len(of) for entry, of in zip(entries, tokens, strict=True)]
        decode_count = next((i for i, t in enumerate(tokens) if len(t) > 1), len(entries))
        self.step += 1
        updates = tuple(
            PageUpdates(**{
                name: np.array([update[place] for update in of_group], np.int32)
                for place, name in enumerate(("row_U", "index_U", "page_U"))
            })
            for of_group in grown
        )
        plan = StepPlan(
            step=self.step,
            row_A=np.array([entry.row for entry in entries], np.int32),
            start_A=np.array(starts, np.int32),
            count_A=np.array([len(t) for t in tokens], np.int32),
            from_row_A=np.array([entry.tokens is None for entry in entries]),
            samples_A=np.array([entry.samples for entry in entries]),
            scores_A=np.array([entry.targets is not None for entry in entries]),
            token_T=np.array([token for t in tokens for token in t], np.int32),
            score_target_T=np.array([target for t in targets for target in t], np.int32),
            decode_count=decode_count,
            admissions=tuple(admissions),
            page_updates=updates,
        )
        plan.check()
        return plan


def complete(runner: RunnerPort, prompt: Sequence[int], count: int, params: SamplingParams | None = None, *,
             row: int = 0, **admission: object) -> list[int]:
    """`count` tokens of one sequence alone, its prompt in one chunk, each step awaited."""
    driver = Driver(runner, seed=99)
    driver.admit(row, prompt, params, **admission)  # type: ignore[arg-type]
    tokens = [int(driver.run(Entry(row, prompt)).token_A[0])]
    while len(tokens) < count:
        tokens.append(int(driver.run(Entry(row)).token_A[0]))
    return tokens
