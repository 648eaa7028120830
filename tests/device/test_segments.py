"""Layers cut into programs: all of them once and in order, few programs, few calls; and the same result as in one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxserve.runner import segments
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.segments import CALLS_MAX, cut
from tests.device.plans import complete
from tests.device.tiny import continuation, prompt_of, tiny_config, tiny_params, tiny_runner, tiny_spec


def spec_of(pattern: str):
    """A model whose layers are equal where the letters are; another letter is another width of the MLP."""
    layer = tiny_spec().layers[0]
    return replace(tiny_spec(), layers=tuple(
        replace(layer, mlp=replace(layer.mlp, width=64 + 16 * ord(letter))) for letter in pattern
    ))


@pytest.mark.parametrize(("pattern", "calls", "compiled"), [
    ("a", 1, 1),
    ("aa", 2, 1),
    ("a" * 30, 10, 3),
    ("a" * 32, 8, 4),
    ("a" * 31, 10, 4 + 3),              # seven of four and one of three
    ("ab" * 21, 7, 6),
    ("aaaaab" * 4 + "aa", 5, 6 + 2),    # Gemma 3: 5 local layers to a global one, 26 in all
    ("b" + "a" * 60, 9, 7 + 7 + 5),     # a dense layer before the mixtures
    ("abcdefgh", 1, 8),
])
def test_few_layers_are_compiled_and_few_calls_made(pattern, calls, compiled):
    found = cut(spec_of(pattern))
    assert [index for segment in found for index in segment.layers] == list(range(len(pattern)))
    assert sum({segment.kind: len(segment.layers) for segment in found}.values()) <= compiled
    assert len(found) <= max(calls, 1) <= CALLS_MAX
    of_kind = {}
    for segment in found:
        letters = pattern[segment.start : segment.stop]
        assert of_kind.setdefault(segment.kind, letters) == letters, "one program for other layers"


def test_layers_that_are_packed_otherwise_are_other_programs():
    """A GGUF file mixes kinds of blocks: equal layers, other shapes."""
    spec = spec_of("a" * 4)
    params = {
        f"layers_{index}": {"weight": jax.ShapeDtypeStruct((8, 8 + 8 * (index % 2)), jnp.uint8)} for index in range(4)
    }
    found = cut(spec, params)
    of_kind = {}
    for segment in found:
        shapes = [params[f"layers_{index}"]["weight"].shape for index in segment.layers]
        assert of_kind.setdefault(segment.kind, shapes) == shapes
    assert [index for segment in found for index in segment.layers] == [0, 1, 2, 3]


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 6])
def test_cut_or_whole_gives_the_same_tokens(tmp_path, monkeypatch, window):
    spec = replace(tiny_spec(window=window), layers=tiny_spec(window=window).layers * 2)
    params = tiny_params(spec, seed=3)
    prompt = prompt_of(7, 1)
    expected = continuation(spec, params, prompt, 5)
    for calls in (1, 2, 4):
        monkeypatch.setattr(segments, "CALLS_MAX", calls)
        config, buckets = tiny_config(store=tmp_path / "store", tokens=8), Buckets(tokens=(8,), rows=(8,))
        runner = tiny_runner(spec, params, config, buckets)
        assert len(runner._programs.segments) == min(calls, 2 if window else 4)
        assert complete(runner, prompt, 5) == expected
        runner.close()
