"""Loading speed: our loader against safetensors' numpy reader and device_put, in turns, each in a process of its own.

    python scripts/bench_load.py                    # a synthetic Llama of about 1 GB, bfloat16
    python scripts/bench_load.py --layers 8 --rounds 5 --format pt

Every run finds the file in the page cache. Peak is anonymous memory above what an idle jax takes: the loaded model is
part of it, pages of the mapped file are not. Theirs gives tensors as they are stored; ours the server's parameters
(fused, checked to be finite).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

READERS = ("ours", "theirs")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True, "dtype": "bfloat16",
}


def write_checkpoint(folder: Path, layer_count: int, form: str) -> int:
    """A model of small random numbers; bytes of its weights."""
    from ml_dtypes import bfloat16

    from jaxserve.weights.safetensors import write_file

    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layer_count}))
    width, inner, kv_width = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["hidden_size"] // 4
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }
    names = {"model.embed_tokens.weight": (CONFIG["vocab_size"], width), "model.norm.weight": (width,)} | {
        f"model.layers.{layer}.{name}.weight": shape for layer in range(layer_count) for name, shape in shapes.items()
    }
    block = np.random.default_rng(0).normal(0, 0.02, 32000 * 1024).astype(bfloat16)
    tensors = {name: block[: int(np.prod(shape))].reshape(shape) for name, shape in names.items()}
    if form == "safetensors":
        write_file(folder / "model.safetensors", tensors)
    else:
        write_torch(folder / "pytorch_model.bin", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def write_torch(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """bfloat16 tensors as torch.save writes them."""
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def sizes(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    body = b""
    for key, (name, tensor) in enumerate(tensors.items()):
        storage = b"(" + text("storage") + b"ctorch\nBFloat16Storage\n" + text(str(key)) + text("cpu")
        storage += b"J" + struct.pack("<i", tensor.size) + b"tQ"
        strides = tuple(stride // tensor.itemsize for stride in tensor.strides)
        view = b"(" + storage + b"K\x00" + sizes(tensor.shape) + sizes(strides) + b"\x89ccollections\nOrderedDict\n)Rt"
        body += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"R"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + body + b"u.")
        for key, tensor in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", tensor.tobytes())


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measured(load: Callable[[], Any]) -> dict[str, float]:
    """Seconds and peak of anonymous memory of one load."""
    peak, done, idle = 0, threading.Event(), anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.monotonic()
    held = load()
    seconds = time.monotonic() - begin
    peak = max(peak, anonymous_bytes())
    done.set()
    thread.join()
    del held
    return {"seconds": seconds, "peak": peak - idle}


def run_once(reader: str, folder: Path) -> dict[str, float]:
    """One load in this process."""
    import jax
    import jax.numpy as jnp

    from jaxserve.models.decoder import abstract_params
    from jaxserve.models.registry import read_spec
    from jaxserve.sharding.mesh import make_mesh
    from jaxserve.weights.loader import load_params

    spec, mesh = read_spec(folder), make_mesh(jax.devices()[:1])
    abstract_params(spec, "bfloat16", mesh)
    jax.block_until_ready(jnp.zeros(4))

    def theirs() -> Any:
        from safetensors.numpy import load_file

        return jax.block_until_ready({
            name: jax.device_put(tensor) for name, tensor in load_file(folder / "model.safetensors").items()
        })

    if reader == "theirs":
        import safetensors.numpy  # noqa: F401  its import is not loading

        return measured(theirs)
    return measured(lambda: jax.block_until_ready(load_params(spec, folder, mesh, "bfloat16")))


def in_a_process(reader: str, folder: Path) -> dict[str, float]:
    """One load in a fresh process."""
    command = [sys.executable, __file__, "--once", reader, "--folder", str(folder)]
    search = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=31, help="31 are about 1 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--format", choices=("safetensors", "pt"), default="safetensors", help="pt: ours alone")
    parser.add_argument("--once", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(run_once(options.once, options.folder)))
        return
    readers = READERS if options.format == "safetensors" else READERS[:1]
    with tempfile.TemporaryDirectory() as name:
        size = write_checkpoint(Path(name), options.layers, options.format)
        found: dict[str, list[dict[str, float]]] = {reader: [] for reader in readers}
        for _ in range(options.rounds):
            for reader in readers:
                found[reader].append(in_a_process(reader, Path(name)))
    print(f"{size / 1e6:.0f} MB of {options.format}, medians of {options.rounds} in turns")
    for reader, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        middle, peak = statistics.median(seconds), max(run["peak"] for run in runs)
        print(
            f"{reader:7} {middle:.2f} s ({min(seconds):.2f}-{max(seconds):.2f})  {size / middle / 1e9:.2f} GB/s  "
            f"peak {peak / 1e6:.0f} MB, {(peak - size) / 1e6:.0f} beyond the model"
        )


if __name__ == "__main__":
    main()
