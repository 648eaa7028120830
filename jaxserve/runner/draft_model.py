"""A second, smaller model that drafts: its programs, its pages, and how a draft becomes steps of it.

It computes what the served model computes, token for token, into pages of its own under the same page numbers: so one
page table, one prefix cache and one rollback serve both. Drafting is one program: a loop of greedy steps on the device.
It knows no sequence, no policy, and not what becomes of a draft.
Invariant: wherever the served model's pages hold a position, the draft's hold the same position of the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.plan import I32, DraftPlan, PageUpdates, StepPlan
from jaxserve.layers.context import LayerKv
from jaxserve.models.decoder import Decoder
from jaxserve.runner import kv_cache
from jaxserve.runner.buckets import holder
from jaxserve.runner.compile import Executable, Program
from jaxserve.runner.forward import begin, run_layers
from jaxserve.runner.inputs import StepLayout, pack
from jaxserve.runner.programs import CLEAR_PAGES, ProgramSet
from jaxserve.runner.sample import logits_of_own_rows
from jaxserve.runner.setup import RunnerSetup
from jaxserve.sharding import collectives


class DraftModel(ProgramSet):
    """Programs, parameters and pages of a draft model. Mutable: its pages are donated from program to program.

    Attributes:
      follow, write: executables by token bucket, as far as they are compiled.  single: the ones without buckets.
    """

    def __init__(self, setup: RunnerSetup, spec: ModelSpec, params: Any, tokens_max: int) -> None:
        super().__init__(replace(setup, spec=spec), params)
        self._flat, self._tokens_max = tuple(jax.tree.leaves(params)), tokens_max
        self._pages: tuple[LayerKv, ...] | None = None
        self.follow: dict[int, Executable] = {}
        self.write: dict[int, Executable] = {}
        self.single: dict[int, Executable] = {}
        self.write_buckets = setup.buckets.of_decodes(setup.shape.row_count)

    # Programs.

    def follow_program(self, tokens: int) -> Program:
        """The keys and values of a step of at most `tokens` tokens."""
        layout = self.layout(tokens)
        return self._program(
            f"draft_follow_T{tokens}",
            functools.partial(follow_step, model=self._model, tree=self._tree, layout=layout),
            (self._abstract(self._flat), self._kv, *self._begin_arguments(tokens)[1:]), self._kv, donated=(1,),
            closes_over=layout,
        )

    def write_program(self, tokens: int) -> Program:
        """Drafts for at most `tokens` rows. Its steps are decodes, so it needs no prefill wherever it runs."""
        layout, count = self.layout(tokens), self._tokens_max + 1
        return self._program(
            f"draft_write_T{tokens}",
            functools.partial(
                write_drafts, model=self._decode_model, tree=self._tree, layout=layout,
                vocab_size=self._setup.shape.vocab_size,
            ),
            (self._abstract(self._flat), self._kv, self._tables, self._array(count, layout.size)),
            (self._kv, 0), donated=(1,), closes_over=(layout, count, self._setup.shape.vocab_size),
        )

    def single_programs(self) -> tuple[Program, Program]:
        """Zeroed pages, and pages zeroed again."""
        layers = tuple(range(len(self._kv)))
        reset = self._program("draft_reset", functools.partial(_zeros, like=self._kv), (), self._kv,
                              closes_over=self._setup.shape)
        clear = self._program(
            "draft_clear", functools.partial(_clear, layers=layers), (self._kv, self._array(CLEAR_PAGES)), self._kv,
            donated=(0,),
        )
        return reset, clear

    # Work, on the engine's thread.

    def reset(self) -> None:
        """New, zeroed pages."""
        self._pages = None     # gone before its successor is allocated
        self._pages = self.single[0]()

    def clear_pages(self, page_U: I32) -> None:
        self._pages = self.single[1](self._pages, page_U)

    def close(self) -> None:
        self._pages, self._flat = None, ()

    def follow_plan(
        self, plan: StepPlan, tokens: int, packed: I32, page_RM: Any, last_token_R: Array, is_long_R: Array
    ) -> None:
        """Computes what a step of the served model is about to compute, unless drafting did so already."""
        is_written = plan.draft_A is not None and bool(
            ((plan.draft_A > 0) & (plan.draft_A + 1 == plan.count_A)).all()
        )
        if not is_written:
            self._pages = self.follow[tokens](self._flat, self._pages, page_RM, last_token_R, is_long_R, packed)

    def draft(self, plan: DraftPlan, page_RM: Any, sizes: tuple[int, ...]) -> I32:
        """The most likely tokens after each entry's last, [N, k]; zeros past an entry's count.

        Args:
          sizes: the buckets of `write` that are there; more rows than the largest holds go one lot after the other.
        """
        token_NI = np.zeros((plan.row_N.shape[0], self._tokens_max), np.int32)
        for first in range(0, plan.row_N.shape[0], sizes[-1]):
            lot = slice(first, first + sizes[-1])
            part = replace(
                plan, row_N=plan.row_N[lot], start_N=plan.start_N[lot], token_N=plan.token_N[lot],
                count_N=plan.count_N[lot],
            )
            layout = self.layout(holder(sizes, part.row_N.shape[0]))
            steps = unrolled(part, self._tokens_max, self._setup.shape.page_size)
            packed_IW = np.stack([pack(step, layout) for step in steps])
            self._pages, token_IT = self.write[layout.tokens](self._flat, self._pages, page_RM, packed_IW)
            found_IT = np.asarray(token_IT)
            for index in range(self._tokens_max):
                taking = np.flatnonzero(part.count_N >= index)     # who is in this step of the loop
                drafts = part.count_N[taking] > index              # its last one only writes what was drafted before
                token_NI[first + taking[drafts], index] = found_IT[index, : taking.shape[0]][drafts]
        return token_NI


def unrolled(plan: DraftPlan, tokens_max: int, page_size: int) -> list[StepPlan]:
    """A draft as tokens_max + 1 steps of one token a row; the last one leaves the last drafted token's keys.

    A row's new pages come with the step that first writes them: at most one a row and step.
    """
    start_of = dict(zip(plan.row_N.tolist(), plan.start_N.tolist(), strict=True))
    row_U, index_U, page_U = (getattr(plan.pages, name) for name in ("row_U", "index_U", "page_U"))
    begin_U = np.array([start_of.get(row, -1) for row in row_U.tolist()], np.int32)
    step_U = np.where(begin_U < 0, -1, np.maximum(index_U * page_size - begin_U, 0))
    steps = []
    for number in range(tokens_max + 1):
        takes_N, comes_U = plan.count_N >= number, step_U == number
        row_A, size = plan.row_N[takes_N], int(takes_N.sum())
        no_A = np.zeros(size, bool)
        steps.append(StepPlan(
            step=number, row_A=row_A, start_A=plan.start_N[takes_N] + number, count_A=np.ones(size, np.int32),
            from_row_A=no_A if number == 0 else ~no_A, samples_A=no_A, scores_A=no_A,
            token_T=plan.token_N if number == 0 else np.zeros(size, np.int32),
            score_target_T=np.full(size, -1, np.int32), decode_count=size,
            page_updates=(PageUpdates(row_U=row_U[comes_U], index_U=index_U[comes_U], page_U=page_U[comes_U]),),
        ))
    return steps


def follow_step(
    leaves: Sequence[Array], kv: tuple[LayerKv, ...], page_RM: tuple[Array, ...], last_token_R: Array,
    is_long_R: Array, packed_W: Array, *, model: Decoder, tree: Any, layout: StepLayout,
) -> tuple[LayerKv, ...]:
    """The pages after a step. What only hidden states need is never computed: nothing asks for them."""
    params = jax.tree.unflatten(tree, leaves)
    begun = begin(params, page_RM, last_token_R, is_long_R, packed_W, model=model, layout=layout)
    layers = range(len(model.spec.layers))
    of_layers = [params[f"layers_{index}"] for index in layers]
    return run_layers(of_layers, begun.x_TD, begun.turns, begun.context, kv, model=model, layers=layers)[1]


def write_drafts(
    leaves: Sequence[Array], kv: tuple[LayerKv, ...], page_RM: tuple[Array, ...], packed_IW: Array, *,
    model: Decoder, tree: Any, layout: StepLayout, vocab_size: int,
) -> tuple[tuple[LayerKv, ...], Array]:
    """One greedy step after the other, each fed with the tokens of the one before: the pages, and all tokens [I, T].

    Several devices share out the rows of each step, and tell each other the tokens.
    """
    params = jax.tree.unflatten(tree, leaves)
    layers = range(len(model.spec.layers))
    of_layers = [params[f"layers_{index}"] for index in layers]

    def step(state: tuple[Any, Any, Array], packed_W: Array) -> tuple[tuple[Any, Any, Array], Array]:
        kv, page_RM, last_token_R = state
        begun = begin(params, page_RM, last_token_R, last_token_R, packed_W, model=model, layout=layout)
        x_TD, kv = run_layers(of_layers, begun.x_TD, begun.turns, begun.context, kv, model=model, layers=layers)
        hidden_TD = model.apply({"params": params}, x_TD, method="finish")
        logits_TV = logits_of_own_rows(model, params, hidden_TD, vocab_size)
        best_T = jnp.argmax(logits_TV, axis=-1).astype(jnp.int32)
        token_T = collectives.all_rows(best_T, "samples")[: layout.tokens]
        last_token_R = last_token_R.at[begun.context.row_T].set(token_T, mode="drop")
        return (kv, begun.context.page_RM, last_token_R), token_T

    last_token_R = jnp.zeros(layout.row_count, jnp.int32)
    (kv, _, _), token_IT = jax.lax.scan(step, (kv, page_RM, last_token_R), packed_IW)
    return kv, token_IT


def _zeros(*, like: tuple[LayerKv, ...]) -> tuple[LayerKv, ...]:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), like)


def _clear(kv: tuple[LayerKv, ...], page_U: Array, *, layers: tuple[int, ...]) -> tuple[LayerKv, ...]:
    return kv_cache.clear(kv, layers, page_U)
