"""Padding and packing: a plan's real counts become one int32 vector of a bucket's size, and back into arrays on the
device. The only file that knows padding.

Padding tokens carry row R, position 0 and token 0; padding samples row R; padding page updates row R: every scatter
drops them, every gather of them is unused.
Invariant: `unpack(layout, pack(plan, layout))` holds the plan; a packed vector is fresh for every step and never
written again, because the device may alias it for as long as the step is in flight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jax import Array

from jaxserve.core.plan import I32, StepPlan
from kernels_pallas.work import AttentionWork, plan_work, work_layout

FED_BACK = -1     # in place of a token: the row's newest sample, which only the device knows


class PageUpdateArrays(NamedTuple):
    """table[row_U, index_U] = page_U for one KV group; row R is padding."""

    row_U: Array
    index_U: Array
    page_U: Array


class StepInput(NamedTuple):
    """One step as the compiled forward sees it.

    Attributes:
      token_T: FED_BACK where the token is the row's newest sample.
      sample_token_B: packed index of the last token of each sampling entry, and of its tokens before drafts.
      sample_row_B: its row.  sample_position_B: the position that the sampled token will have.
    """

    token_T: Array
    row_T: Array
    position_T: Array
    sample_token_B: Array
    sample_row_B: Array
    sample_position_B: Array
    updates: tuple[PageUpdateArrays, ...]
    work: AttentionWork


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Where each array lies in the packed vector of one token bucket.

    Attributes:
      tokens: T.  rows: the largest B, whatever the step samples, so that no program depends on both T and B.
      row_count: R.  group_count: KV groups.
    """

    tokens: int
    rows: int
    row_count: int
    group_count: int

    @cached_property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (offset, shape)."""
        T, B = (self.tokens,), (self.rows,)
        shapes: dict[str, tuple[int, ...]] = {"token_T": T, "row_T": T, "position_T": T}
        shapes |= {"sample_token_B": B, "sample_row_B": B, "sample_position_B": B}
        for group in range(self.group_count):
            shapes |= {f"{name}.{group}": T for name in PageUpdateArrays._fields}
        shapes |= work_layout(self.tokens, self.row_count)
        fields, offset = {}, 0
        for name, shape in shapes.items():
            fields[name] = (offset, shape)
            offset += math.prod(shape)
        return fields

    @cached_property
    def size(self) -> int:
        """Length of the packed vector."""
        offset, shape = list(self.fields.values())[-1]
        return offset + math.prod(shape)

    def views(self, packed: I32) -> dict[str, I32]:
        """The arrays of a packed vector, host or device side, by name."""
        return {
            name: packed[offset : offset + math.prod(shape)].reshape(shape)
            for name, (offset, shape) in self.fields.items()
        }


def pack(plan: StepPlan, layout: StepLayout) -> I32:
    """The one host-to-device transfer of a step."""
    packed = np.zeros(layout.size, np.int32)
    view = layout.views(packed)
    tokens = plan.token_count
    last_A = np.cumsum(plan.count_A, dtype=np.int32) - 1
    view["token_T"][:tokens] = plan.token_T
    view["token_T"][last_A[plan.from_row_A]] = FED_BACK
    view["row_T"][tokens:] = layout.row_count
    if tokens == plan.row_A.shape[0]:      # decodes only
        view["row_T"][:tokens] = plan.row_A
        view["position_T"][:tokens] = plan.start_A
    else:
        view["row_T"][:tokens] = np.repeat(plan.row_A, plan.count_A)
        before_A = plan.start_A - (last_A + 1 - plan.count_A)     # position of an entry's token less its packed index
        view["position_T"][:tokens] = np.arange(tokens) + np.repeat(before_A, plan.count_A)
    count = plan.sample_count
    end_A = plan.start_A + plan.count_A
    view["sample_row_B"][count:] = layout.row_count
    if plan.draft_A is None:
        view["sample_token_B"][:count] = last_A[plan.samples_A]
        view["sample_row_B"][:count] = plan.row_A[plan.samples_A]
        view["sample_position_B"][:count] = end_A[plan.samples_A]
    else:
        of_A = plan.sample_counts
        back_N = np.repeat(np.cumsum(of_A) - 1, of_A) - np.arange(count)     # tokens before the entry's last one
        view["sample_token_B"][:count] = np.repeat(last_A, of_A) - back_N
        view["sample_row_B"][:count] = np.repeat(plan.row_A, of_A)
        view["sample_position_B"][:count] = np.repeat(end_A, of_A) - back_N
    for group in range(layout.group_count):
        updates = plan.page_updates[group] if plan.page_updates else None
        used = 0 if updates is None else updates.row_U.shape[0]
        for name in PageUpdateArrays._fields:
            if used:
                view[f"{name}.{group}"][:used] = getattr(updates, name)
        view[f"row_U.{group}"][used:] = layout.row_count
    work = plan_work(
        row_A=plan.row_A, start_A=plan.start_A, count_A=plan.count_A, decode_count=plan.decode_count,
        token_count_bucket=layout.tokens, row_count=layout.row_count,
    )
    for name, array in work.items():
        view[name][...] = array
    return packed


def unpack(packed_W: Array, layout: StepLayout) -> StepInput:
    """Slices the packed vector inside the compiled forward."""
    view = layout.views(packed_W)
    updates = tuple(
        PageUpdateArrays(*(view[f"{name}.{group}"] for name in PageUpdateArrays._fields))
        for group in range(layout.group_count)
    )
    work = {name: view[name] for name in work_layout(layout.tokens, layout.row_count)}
    plain = {name: view[name] for name in StepInput._fields if name not in ("updates", "work")}
    return StepInput(updates=updates, work=AttentionWork.from_arrays(work), **plain)
