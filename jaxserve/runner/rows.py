"""Admission of sequences to rows: sampling state and page tables, written in fixed batches by compiled programs.

Joins `row_state` and page tables; knows no step and no model. Invariant: an admission overwrites everything its row
held; padding rows (R) write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxserve.core.plan import RowAdmission, RunnerShape
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.runner import row_state
from jaxserve.runner.kv_cache import page_index_max
from jaxserve.runner.row_state import RowState

ADMIT_ROWS = 8      # rows that one admit writes

Arrays = dict[str, NDArray[np.generic]]


class Admission(NamedTuple):
    """What `admit` writes: for `row_state.admit`, and one page table a KV group."""

    state: Arrays
    page_AM: tuple[NDArray[np.int32], ...]


def empty(shape: RunnerShape) -> RowState:
    """The state of all rows before anyone is admitted."""
    return row_state.empty_rows(
        row_count=shape.row_count, slot_count=shape.slot_count, vocab_size=shape.vocab_size
    )


def pack(admissions: Sequence[RowAdmission], shape: RunnerShape) -> Admission:
    """At most ADMIT_ROWS admissions as arrays of fixed shapes."""
    tables = tuple(np.zeros((ADMIT_ROWS, page_index_max(shape)), np.int32) for _ in shape.groups)
    for entry, admission in enumerate(admissions):
        for page_AM, pages in zip(tables, admission.pages, strict=True):
            # A page that has slid out of a window is -1 on the host; no position looks there, but an index must be one.
            page_AM[entry, : len(pages)] = np.maximum(pages, 0)
    state = row_state.pack_admission(admissions, shape.row_count, ADMIT_ROWS, shape.rope_switch)
    return Admission(state=state, page_AM=tables)


def pack_slot(admission: RowAdmission, shape: RunnerShape) -> Arrays:
    """One admission's shaping slot."""
    return row_state.pack_slot(admission, vocab_size=shape.vocab_size)


def abstract_slot(shape: RunnerShape) -> Arrays:
    """Arrays of the shapes that `pack_slot` gives."""
    blank = RowAdmission(
        row=0, params=SamplingParams(), seed=0, choice=0, prompt_length=0, token_ids=np.zeros(0, np.int32), pages=(),
        slot=0,
    )
    return pack_slot(blank, shape)


def admit(
    rows: RowState, page_RM: tuple[Array, ...], admission: Admission
) -> tuple[RowState, tuple[Array, ...]]:
    """Writes state and page tables of the admitted rows."""
    row_A = admission.state["row"]
    tables = tuple(
        table_RM.at[row_A].set(page_AM, mode="drop")
        for table_RM, page_AM in zip(page_RM, admission.page_AM, strict=True)
    )
    return row_state.admit(rows, admission.state), tables


def admit_slot(rows: RowState, slot: dict[str, Array]) -> RowState:
    """Writes one shaping slot."""
    return row_state.admit_slot(rows, slot)
