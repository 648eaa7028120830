"""`--batch-invariant`: bfloat16 logprobs are equal to the bit whatever else is in the batch, preempted or shared."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxserve.core.progress import NoProgress
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.runner import Runner
from jaxserve.runner.start import plan_memory
from kernels_pallas.native import api as native
from tests.device.test_runner_engine import run
from tests.device.tiny import prompt_of, tiny_config, tiny_mesh, tiny_params, tiny_spec


@pytest.fixture(scope="module", params=[None, pytest.param(6, marks=pytest.mark.slow)], ids=["one group", "two groups"])
def runner(request, compile_cache):
    spec = tiny_spec(window=request.param)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params(spec, seed=5))
    config = tiny_config(store=compile_cache, pages=18)
    config = replace(config, compilation=replace(config.compilation, batch_invariant=True))
    setup = plan_memory(spec=spec, params=params, mesh=tiny_mesh(), dtype=jnp.dtype(jnp.bfloat16), config=config)
    least = 3 if native.refusals() else 1
    assert setup.buckets.tokens[0] == setup.buckets.rows[0] == least, "lanes must not be met"
    setup = replace(setup, buckets=Buckets(tokens=(least, 8, 32), rows=(least, 8)))
    runner = Runner.create(setup=setup, params=params)
    runner.compile_serving_set(NoProgress())
    runner.compile_rest(NoProgress())
    assert runner.wait_ready(240)
    yield runner
    runner.close()


def test_logprobs_alone_and_in_a_crowd_are_equal_to_the_bit(runner):
    requests = [(f"r{index}", prompt_of(3 + 5 * (index % 4), index), 10 + 3 * (index % 5)) for index in range(10)]
    together, _ = run(runner, requests, prefix=True, overlap=True, logprobs=2)
    for request in requests:
        alone, _ = run(runner, [request], prefix=True, overlap=True, logprobs=2)
        name = request[0]
        assert [output.logprobs for output in together[name]] == [output.logprobs for output in alone[name]]
