"""Runs the compiled forward over a paged cache by hand, and gives the logits of every token: what a sampler never
sees. One token bucket, so a family costs one compilation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.plan import KvGroupShape, RunnerShape
from jaxserve.models.decoder import Decoder
from jaxserve.runner.forward import forward
from jaxserve.runner.inputs import StepLayout, pack
from jaxserve.runner.kv_cache import abstract_pool, page_index_max
from tests.device.plans import Driver, Entry
from tests.device.tiny import tiny_mesh

# What is computed matters here, not how fast: a quarter of the compiling time is saved, and the engine's own tests
# compile as servers do.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ROWS, PAGE_SIZE, LENGTH, TOKENS = 4, 4, 128, 32


class PagedForward:
    """A model and its cache; `run` computes one step. Mutable: the cache."""

    def __init__(self, spec: ModelSpec, params: Any) -> None:
        self.shape = RunnerShape(
            row_count=ROWS, page_size=PAGE_SIZE, length_max=LENGTH, slot_count=1, vocab_size=spec.vocab_size,
            alternatives_max=1, groups=tuple(
                KvGroupShape(page_count=64, window=group.window) for group in spec.kv_groups
            ),
        )
        pool = abstract_pool(spec, self.shape, jnp.dtype(jnp.float32), tiny_mesh())
        self._kv = jax.tree.map(lambda page: jnp.full(page.shape, jnp.nan, page.dtype), pool)   # unused is poison
        self._leaves, tree = jax.tree.flatten(params)
        self._params = params
        self.is_long_R = np.zeros(ROWS, bool)
        self._model = Decoder(spec=spec, dtype=jnp.float32)
        self._layout = StepLayout(tokens=TOKENS, rows=ROWS, row_count=ROWS, group_count=len(self.shape.groups))
        self._forward = jax.jit(
            functools.partial(forward, model=self._model, tree=tree, layout=self._layout), compiler_options=QUICK
        )
        self._logits = jax.jit(
            lambda params, hidden_TD: self._model.apply({"params": params}, hidden_TD, method="logits"),
            compiler_options=QUICK,
        )
        self.driver = Driver(self)  # type: ignore[arg-type]

    def run(self, *entries: Entry) -> list[np.ndarray]:
        """Logits [count, V] of each entry's tokens."""
        plan = self.driver.plan(*entries)
        tables = []
        for group in range(len(self.shape.groups)):
            table_RM = np.full((ROWS, page_index_max(self.shape)), -1, np.int32)
            for row, held in self.driver.rows.items():
                table_RM[row, : len(held.pages[group])] = held.pages[group]
            tables.append(jnp.asarray(table_RM))
        result = self._forward(
            self._leaves, self._kv, tuple(tables), jnp.zeros(ROWS, jnp.int32), self.is_long_R,
            pack(plan, self._layout),
        )
        self._kv = result.kv
        logits_TV = np.asarray(self._logits(self._params, result.hidden_TD))
        return np.split(logits_TV[: plan.token_count], np.cumsum(plan.count_A)[:-1])


def chunked_logits(spec: ModelSpec, params: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                   chunk: int = 20) -> list[np.ndarray]:
    """Logits of every position of each sequence, run side by side: prompts in chunks, then a token at a time."""
    machine = PagedForward(spec, params)
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    todo = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        machine.driver.admit(row, prompt)
        machine.is_long_R[row] = spec.rope_switch is not None and len(prompt) > spec.rope_switch
        chunks = [list(prompt[i : i + chunk]) for i in range(0, len(prompt), chunk)]
        todo.append(chunks + [[token] for token in answer])
    while any(todo):
        step = sorted((len(chunks[0]), row) for row, chunks in enumerate(todo) if chunks)
        entries = [Entry(row, todo[row].pop(0), samples=False) for _, row in step]
        for entry, logits_TV in zip(entries, machine.run(*entries), strict=True):
            found[entry.row].append(logits_TV)
    return [np.concatenate(parts) for parts in found]
