"""Loading holds no second model: peak anonymous memory of a process that loads a synthetic checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import family, spec_from_config
from jaxserve.quantization.packing import path_of
from jaxserve.weights.safetensors import write_file

# Anonymous memory only: pages of the mapped file belong to the kernel, which takes them back when it wants.
PROBE = """
import json, sys, threading, time
from pathlib import Path
import jax
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params
from jaxserve.weights.random import random_params

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous_bytes())

folder, how, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
spec, mesh = read_spec(folder), make_mesh(jax.devices()[:1])
abstract_params(spec, dtype, mesh)
jax.block_until_ready(jax.numpy.zeros(4))
idle = anonymous_bytes()
thread = threading.Thread(target=watch)
thread.start()
start = time.monotonic()
params = load_params(spec, folder, mesh, dtype) if how == "load" else random_params(spec, mesh, dtype)
seconds = time.monotonic() - start
peak = max(peak, anonymous_bytes())
done.set()
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"peak": peak - idle, "size": size, "seconds": seconds}))
"""

# Four devices that are one CPU: what each holds while loading goes on, and in the end.
DEVICES_PROBE = """
import json, math, sys, threading
from collections import Counter
from pathlib import Path
import jax
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params

def held():
    found = Counter()
    for array in jax.live_arrays():
        for device in array.sharding.device_set:
            found[device.id] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return [found[device.id] for device in jax.devices()]

peak, done = [0] * 4, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = [max(pair) for pair in zip(peak, held())]

folder = Path(sys.argv[1])
thread = threading.Thread(target=watch)
thread.start()
params = load_params(read_spec(folder), folder, make_mesh(jax.devices(), 4), "bfloat16")
done.set()
thread.join()
leaves = jax.tree.leaves(params)
print(json.dumps({
    "peak": peak, "end": held(), "largest": max(leaf.nbytes for leaf in leaves),
    "size": sum(leaf.nbytes for leaf in leaves),
}))
"""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True, "dtype": "bfloat16",
}


def synthetic(folder: Path, layer_count: int, dtype: Any = ml_dtypes.bfloat16) -> int:
    """Writes a checkpoint of zeros; its size in bytes."""
    config = {**CONFIG, "num_hidden_layers": layer_count}
    (folder / "config.json").write_text(json.dumps(config))
    spec = spec_from_config(config)
    sources = family(spec.family).weights(spec).sources
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(spec, jnp.bfloat16)):
        for section in sources[path_of(path)]:
            # Untouched zeros take no memory until they are written.
            tensors["model." + section.name] = np.zeros((section.rows or leaf.shape[0], *leaf.shape[1:]), dtype)
    write_file(folder / "model.safetensors", tensors)
    return sum(data.nbytes for data in tensors.values())


def probe(folder: Path, how: str, dtype: str = "bfloat16") -> dict[str, float]:
    return run(PROBE, str(folder), how, dtype)


def run(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    search = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": search, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("small")
    return folder, synthetic(folder, 7)


def test_loading_needs_little_more_than_the_model(small: tuple[Path, int]) -> None:
    folder, size = small
    assert 250e6 < size < 350e6
    found = probe(folder, "load")
    assert found["size"] == size
    assert size <= found["peak"] <= size + 100e6, found


def test_a_device_never_holds_more_than_its_part_and_one_tensor(small: tuple[Path, int]) -> None:
    folder, size = small
    found = run(DEVICES_PROBE, str(folder), XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert found["size"] == size
    for peak, end in zip(found["peak"], found["end"], strict=True):
        assert size / 4 <= end <= size / 4 * 1.01, "all but the norms is split"
        assert 0 < peak <= end + found["largest"], found


def test_converting_needs_little_more_than_the_result(small: tuple[Path, int]) -> None:
    folder, size = small
    found = probe(folder, "load", "float32")
    assert found["size"] == 2 * size
    assert found["peak"] <= 2 * size + 100e6, found


def test_dummy_weights_need_little_more_than_the_model(small: tuple[Path, int]) -> None:
    folder, size = small
    found = probe(folder, "random")
    assert found["size"] == size
    assert size <= found["peak"] <= size + 150e6, found


@pytest.mark.slow
def test_loading_two_gigabytes(tmp_path: Path) -> None:
    size = synthetic(tmp_path, 64)
    assert 1.9e9 < size < 2.2e9
    found = probe(tmp_path, "load")
    print(f"checkpoint {size / 1e6:.0f} MB, peak {found['peak'] / 1e6:.0f} MB, {found['seconds']:.1f} s")
    assert found["peak"] <= size + 500e6, found
