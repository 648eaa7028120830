"""The programs of a runner: each pure function with its abstract arguments, donations and placements.

Knows shapes; compiles nothing. Four kinds: forward (begin, the kinds of segments and finish, for each T bucket, and
where asked for the kinds of segments without prefill), sample (a B bucket each), score (a T bucket each), and the ones
without buckets: reset, admit, admit_slot, clear.
On several devices each function is what one device does (`shard_map`).
Invariant: what depends on T does not depend on B, so the programs of all steps are a few a T bucket and one a B bucket.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.core.plan import RunnerShape
from jaxserve.layers import paged
from jaxserve.layers.context import LayerKv
from jaxserve.models.decoder import Decoder
from jaxserve.quantization.packing import multiplied_by
from jaxserve.quantization.qtensor import QTensor
from jaxserve.runner import kv_cache, rows
from jaxserve.runner.compile import Program
from jaxserve.runner.forward import Begun, Sampling, begin, finish, run_layers
from jaxserve.runner.inputs import StepLayout
from jaxserve.runner.row_state import RowState
from jaxserve.runner.sample import head_params, sample_step, score_step
from jaxserve.runner.sampling import ROWS_TOGETHER, Logprobs, Sampled
from jaxserve.runner.segments import cut, ends, leaves_of
from jaxserve.runner.setup import RunnerSetup
from kernels_pallas.native import api as native
from kernels_pallas.storage import storage_dtype

CLEAR_PAGES = 16    # pages that one clear zeroes


class ProgramSet:
    """Programs of one model at one setup; `params` may be arrays or their abstract values."""

    def __init__(self, setup: RunnerSetup, params: Any) -> None:
        self._setup = setup
        attend = functools.partial(paged.attend, implementation=setup.attention)
        self._model = Decoder(spec=setup.spec, dtype=setup.dtype, attend=attend, experts=setup.experts)
        self._decode_model = self._model.clone(attend=functools.partial(attend, has_prefill=False))
        params = multiplied_by(self._abstract(params), setup.products)
        self.segments = cut(setup.spec, params)
        self._leaves, self._tree = leaves_of(params, self.segments), jax.tree.structure(params)
        nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QTensor))
        self._kernels = native.identity(is_packed=any(isinstance(node, QTensor) for node in nodes))
        self._layer_trees = [jax.tree.structure(params[f"layers_{index}"]) for index in range(len(setup.spec.layers))]
        self._end_trees = tuple(jax.tree.structure(end) for end in ends(params))
        self._head_leaves, self._head_tree = jax.tree.flatten(head_params(params, setup.spec))
        self._head_leaves = tuple(self._head_leaves)
        self._kv = kv_cache.abstract_pool(
            setup.spec, setup.shape, storage_dtype(setup.dtype), setup.mesh, setup.kv_codes
        )
        self._tables = kv_cache.abstract_tables(setup.shape, setup.replicated)
        self._rows = self._placed(jax.eval_shape(functools.partial(rows.empty, setup.shape)))
        B = setup.buckets.rows_max
        self._layouts = {
            tokens: StepLayout(
                tokens=tokens, rows=B, row_count=setup.shape.row_count, group_count=len(setup.shape.groups)
            )
            for tokens in setup.buckets.tokens
        }
        self._sampling = Sampling(
            hidden_BD=self._array(B, setup.spec.width, dtype=setup.dtype),
            row_B=self._array(B), position_B=self._array(B),
        )

    def layout(self, tokens: int) -> StepLayout:
        """The packed vector of a token bucket."""
        return self._layouts[tokens]

    def forward(self, tokens: int) -> tuple[Program, ...]:
        """A step of at most `tokens` tokens: begin, the layers of each kind of segment, finish."""
        begun = self._begun(tokens)
        return self._begin(tokens, begun), *self._kinds(tokens, begun), self._finish(tokens, begun)

    def decode_layers(self, tokens: int) -> tuple[Program, ...]:
        """The layers of `forward` for steps of decodes only: between the same begin and finish, without prefill."""
        return self._kinds(tokens, self._begun(tokens), has_prefill=False)

    def _kinds(self, tokens: int, begun: Begun, *, has_prefill: bool = True) -> tuple[Program, ...]:
        """The layers of each kind of segment."""
        firsts = {segment.kind: segment for segment in reversed(self.segments)}     # the first of each kind
        return tuple(
            self._layers(tokens, begun, firsts[kind].layers, has_prefill=has_prefill) for kind in range(len(firsts))
        )

    def _begin(self, tokens: int, begun: Begun) -> Program:
        layout = self.layout(tokens)
        return self._program(
            f"forward_T{tokens}_begin",
            functools.partial(_on_tree, begin, self._end_trees[0], model=self._model, layout=layout),
            self._begin_arguments(tokens), begun, donated=(1,), closes_over=layout,
        )

    def _begin_arguments(self, tokens: int) -> tuple[Any, ...]:
        return (
            self._leaves.begin, self._tables, self._rows.last_token_R, self._rows.settings.is_long_R,
            self._array(self.layout(tokens).size),
        )

    def _begun(self, tokens: int) -> Begun:
        function = functools.partial(
            _on_tree, begin, self._end_trees[0], model=self._model, layout=self.layout(tokens)
        )
        return self._placed(jax.eval_shape(function, *self._begin_arguments(tokens)))

    def _layers(self, tokens: int, begun: Begun, layers: range, *, has_prefill: bool) -> Program:
        trees = [self._layer_trees[index] for index in layers]
        leaves = next(
            leaves for leaves, segment in zip(self._leaves.segments, self.segments, strict=True)
            if segment.layers == layers
        )
        kv = self._kv[layers.start : layers.stop]
        model = self._model if has_prefill else self._decode_model
        return self._program(
            f"forward_T{tokens}_{'' if has_prefill else 'decode_'}layers{layers.start}",
            functools.partial(_on_trees, run_layers, trees, model=model, layers=layers),
            (leaves, begun.x_TD, begun.turns, begun.context, kv), (begun.x_TD, kv),
            donated=(1, 4), closes_over=(layers, self.layout(tokens), has_prefill),
        )

    def _finish(self, tokens: int, begun: Begun) -> Program:
        return self._program(
            f"forward_T{tokens}_finish",
            functools.partial(_on_tree, finish, self._end_trees[1], model=self._model),
            (self._leaves.finish, begun.x_TD, begun.token_B, begun.row_B, begun.position_B),
            (begun.x_TD, self._sampling), closes_over=tokens,
        )

    def sample(self, count: int) -> Program:
        """One token for each of at most `count` rows."""
        setup = self._setup
        mode, alternatives, vocab_size = setup.logprobs_mode, setup.shape.alternatives_max, setup.shape.vocab_size
        placement = setup.replicated if setup.spans_processes else setup.by_samples
        together = ROWS_TOGETHER if setup.platform == "cpu" else None
        of_logprobs = jax.ShapeDtypeStruct((setup.mesh.size,), jnp.int32, sharding=placement)
        return self._program(
            f"sample_B{count}",
            functools.partial(
                sample_step, model=self._model, tree=self._head_tree, count=count, vocab_size=vocab_size,
                alternatives=alternatives, mode=mode, tells_logprobs=setup.spans_processes, together=together,
            ),
            (self._head_leaves, self._sampling, self._rows),
            (self._rows, Sampled(0, 0, Logprobs(*[of_logprobs] * len(Logprobs._fields)))),    # type: ignore[arg-type]
            donated=(2,),
            closes_over=(mode, alternatives, vocab_size, setup.spans_processes),
        )

    def score(self, tokens: int) -> Program:
        """Logprobs of given next tokens for a step of at most `tokens` tokens."""
        setup = self._setup
        alternatives, vocab_size = setup.shape.alternatives_max, setup.shape.vocab_size
        placement = setup.replicated if setup.spans_processes else setup.by_samples_of_slabs
        of_logprobs = jax.ShapeDtypeStruct((1, setup.mesh.size), jnp.int32, sharding=placement)
        return self._program(
            f"score_T{tokens}",
            functools.partial(
                score_step, model=self._model, tree=self._head_tree, vocab_size=vocab_size, alternatives=alternatives,
                tells_logprobs=setup.spans_processes,
            ),
            (self._head_leaves, self._array(tokens, setup.spec.width, dtype=setup.dtype), self._array(tokens)),
            Logprobs(*[of_logprobs] * len(Logprobs._fields)),   # type: ignore[arg-type]
            closes_over=(alternatives, vocab_size, setup.spans_processes),
        )

    def admit(self) -> Program:
        """Writes the state and page tables of at most rows.ADMIT_ROWS rows."""
        admission = self._placed(rows.pack((), self._setup.shape))
        return self._program(
            "admit", rows.admit, (self._rows, self._tables, admission), (self._rows, self._tables), donated=(0, 1)
        )

    def admit_slot(self) -> Program:
        """Writes one shaping slot."""
        slot = self._placed(rows.abstract_slot(self._setup.shape))
        return self._program("admit_slot", rows.admit_slot, (self._rows, slot), self._rows, donated=(0,))

    def clear(self, group: int) -> Program:
        """Zeroes at most CLEAR_PAGES pages of one KV group."""
        layers = self._setup.spec.kv_groups[group].layers
        return self._program(
            f"clear_{group}", functools.partial(_clear, layers=layers), (self._kv, self._array(CLEAR_PAGES)),
            self._kv, donated=(0,), closes_over=layers,
        )

    def reset(self) -> Program:
        """Zeroed pages, tables and rows, where they belong."""
        shape = self._setup.shape
        return self._program(
            "reset", functools.partial(_reset, kv=self._kv, tables=self._tables, shape=shape), (),
            (self._kv, self._tables, self._rows), closes_over=shape,
        )

    def _program(
        self, name: str, function: Any, arguments: tuple[Any, ...], results: Any, *,
        donated: tuple[int, ...] = (), closes_over: object = None,
    ) -> Program:
        setup = self._setup
        placements = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or setup.replicated, results)
        return Program(
            name=name, function=on_each_device(function, setup.mesh, arguments, placements),
            arguments=arguments, donated=donated, results=placements,
            identity=" ".join(map(str, (
                repr(setup.spec), setup.dtype, setup.kv_codes, setup.attention, self._tree, self._kernels,
                repr(closes_over),
            ))),
        )

    def _abstract(self, params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or self._setup.replicated
            ),
            params,
        )

    def _array(self, *size: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=self._setup.replicated)

    def _placed(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self._array(*leaf.shape, dtype=leaf.dtype), tree)


def on_each_device(function: Any, mesh: jax.sharding.Mesh, arguments: Any, placements: Any) -> Any:
    """`function`, written for one device, as a function of arrays that lie on all of the mesh."""
    if mesh.size == 1:
        return function
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
    # What is whole on every device is computed by each alike; that is not for jax to prove.
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=jax.tree.map(lambda leaf: leaf.spec, placements), check_vma=False
    )


def _on_tree(function: Any, tree: Any, leaves: Any, *arguments: Any, **closed_over: Any) -> Any:
    """`function` of a parameter tree, as a function of its leaves."""
    return function(jax.tree.unflatten(tree, leaves), *arguments, **closed_over)


def _on_trees(function: Any, trees: Any, leaves: Any, *arguments: Any, **closed_over: Any) -> Any:
    """The same for one tree a layer."""
    params = [jax.tree.unflatten(tree, of_layer) for tree, of_layer in zip(trees, leaves, strict=True)]
    return function(params, *arguments, **closed_over)


def _clear(kv: tuple[LayerKv, ...], page_U: jax.Array, *, layers: tuple[int, ...]) -> tuple[LayerKv, ...]:
    return kv_cache.clear(kv, layers, page_U)


def _reset(*, kv: Any, tables: Any, shape: RunnerShape) -> tuple[tuple[LayerKv, ...], tuple[jax.Array, ...], RowState]:
    kv, tables = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), (kv, tables)
    )
    return kv, tables, rows.empty(shape)
