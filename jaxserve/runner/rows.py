"""Admission of sequences to rows: their sampling state and page tables, written in fixed batches by one program.

Knows no step and no model. Invariant: an admission overwrites everything its row held; padding rows (R) write
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jaxserve.core.plan import RowAdmission, RunnerShape
from jaxserve.runner import sampling
from jaxserve.runner.kv_cache import page_index_max
from jaxserve.runner.sampling import RowState

ADMIT_ROWS = 8      # rows that one admit writes


class Admission(NamedTuple):
    """What `admit` writes for ADMIT_ROWS rows.

    Attributes:
      row_A: R for padding.  page_AM: one table a KV group.  state: for `sampling.admit`.
    """

    row_A: Array
    page_AM: tuple[Array, ...]
    state: Any


def empty(shape: RunnerShape) -> RowState:
    """The state of all rows before anyone is admitted."""
    return sampling.empty_rows(row_count=shape.row_count, slot_count=shape.slot_count, vocab_size=shape.vocab_size)


def pack(admissions: Sequence[RowAdmission], shape: RunnerShape) -> Admission:
    """At most ADMIT_ROWS admissions as arrays of fixed shapes."""
    assert len(admissions) <= ADMIT_ROWS, len(admissions)
    row_A = np.full(ADMIT_ROWS, shape.row_count, np.int32)
    row_A[: len(admissions)] = [admission.row for admission in admissions]
    tables = tuple(np.zeros((ADMIT_ROWS, page_index_max(shape)), np.int32) for _ in shape.groups)
    for entry, admission in enumerate(admissions):
        for page_AM, pages in zip(tables, admission.pages, strict=True):
            page_AM[entry, : len(pages)] = pages
    return Admission(row_A=row_A, page_AM=tables, state=sampling.pack_admission(admissions, shape.row_count, ADMIT_ROWS))


def admit(rows: RowState, page_RM: tuple[Array, ...], admission: Admission) -> tuple[RowState, tuple[Array, ...]]:
    """Writes state and page tables of the admitted rows."""
    tables = tuple(
        table_RM.at[admission.row_A].set(page_AM, mode="drop")
        for table_RM, page_AM in zip(page_RM, admission.page_AM, strict=True)
    )
    return sampling.admit(rows, admission.state), tables
