"""Model folders that must not be served: a table of name, how each is made from a whole tiny one, and what is said.

`scripts/write_malformed_models.py` writes docs/malformed-models.md from what the server says of them;
`tests/device/test_malformed_folders.py` holds both.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.core.config import ModelConfig
from jaxserve.models.hf import read_config
from jaxserve.models.registry import read_spec
from jaxserve.quantization.formats.registry import find_scheme
from jaxserve.sharding.mesh import make_mesh
from jaxserve.text.served_text import ServedText
from jaxserve.weights.loader import load_params
from jaxserve.weights.safetensors import read_file, write_file
from jaxserve.weights.source import locate
from tests.device.torch_files import call, storage, tensor, write_torch

SOUND = Path(__file__).parents[1] / "fixtures" / "tiny-llama-tied"
SINGLE, INDEX, PT = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
CANARY = "canary"       # a file of this name is what code of a folder would leave behind

Spoil = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One malformed folder; `says` is part of its error."""

    name: str
    spoil: Spoil
    says: str


def make(folder: Path, row: Row) -> Path:
    """The sound folder, copied, then spoilt."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOUND / name, folder / name)
    row.spoil(folder)
    return folder


def start(folder: Path) -> None:
    """What a start reads, in its order: place, config, weights, text."""
    found = locate(str(folder))
    spec = read_spec(found)
    scheme = find_scheme(found, read_config(found))
    load_params(spec, found, make_mesh(jax.devices()[:1]), "float32", scheme=scheme)
    ServedText.load(found, ModelConfig(model=str(folder)))


def config(**changes: Any) -> Spoil:
    """Attributes of config.json replaced."""
    return merged("config.json", changes)


def merged(name: str, changes: dict[str, Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return spoil


def holds(name: str, content: bytes) -> Spoil:
    """A file with other content."""
    return lambda folder: (folder / name).write_bytes(content) and None


def without(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def in_turn(*steps: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)
    return spoil


def cut(keep: int) -> Spoil:
    """Only the first bytes of the weights (negative: all but the last)."""
    return lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:keep]) and None


def header(change: Callable[[dict[str, Any]], None], *, length: int | None = None) -> Spoil:
    """The weights' header changed, their data as it was."""
    def spoil(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + size])
        change(content)
        text = json.dumps(content).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", length or len(text)) + text + data[8 + size :])
    return spoil


def entry(**changes: Any) -> Spoil:
    """The header entry of the last norm changed."""
    return header(lambda content: content[NORM].update(changes))


def overlapping(content: dict[str, Any]) -> None:
    other = next(name for name, held in content.items() if name != NORM and held.get("shape") == content[NORM]["shape"])
    content[NORM]["data_offsets"] = content[other]["data_offsets"]


def tensors(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Other tensors in a sound file."""
    def spoil(folder: Path) -> None:
        held = {name: np.array(found.data) for name, found in read_file(folder / SINGLE).items()}
        change(held)
        (folder / SINGLE).unlink()
        write_file(folder / SINGLE, held)
    return spoil


def last_nan(held: dict[str, Any]) -> None:
    held[NORM][-1] = np.nan


def index(weight_map: Any) -> Spoil:
    return holds(INDEX, json.dumps({"weight_map": weight_map}).encode())


def link(name: str, target: str) -> Spoil:
    """A symbolic link in a file's place; `target` is relative to the folder."""
    def spoil(folder: Path) -> None:
        shutil.copy(folder / name, folder.parent / "outside")
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    return spoil


def pipe(name: str) -> Spoil:
    """A pipe in a file's place: opening it waits for ever."""
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    return spoil


def directory(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
    return spoil


def torch(content: Any, storages: dict[str, bytes] | None = None, **fields: Any) -> Spoil:
    """pytorch_model.bin in place of the safetensors."""
    def spoil(folder: Path) -> None:
        (folder / SINGLE).unlink()
        write_torch(folder / PT, content, {"0": bytes(24)} if storages is None else storages, **fields)
    return spoil


def own_code(folder: Path) -> None:
    """A folder that brings its own class, which would leave a canary."""
    merged("config.json", {
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "architectures": ["OwnForCausalLM"],
    })(folder)
    code = f"import pathlib\npathlib.Path({str(folder / CANARY)!r}).touch()\nclass Own: pass\n"
    (folder / "modeling_own.py").write_text(code)


def system(folder: Path) -> None:
    """A pickle that calls os.system to touch a canary."""
    (folder / SINGLE).unlink()
    write_torch(folder / PT, call("os", "system", (f"touch {folder / CANARY}",)), {})


def other_tokenizer(folder: Path) -> None:
    """The model of a smaller vocabulary than its tokenizer."""
    config(vocab_size=100)(folder)
    tensors(lambda held: held.update({EMBEDDING: held[EMBEDDING][:100]}))(folder)


BOMB = b"\x80\x02)q\x00" + b"h\x00\x86q\x00" * 200 + b"."
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n"

ROWS = (
    # config.json
    Row(name="no config.json", spoil=without("config.json"), says="has no config.json"),
    Row(name="config.json is a pipe", spoil=pipe("config.json"), says="has no config.json"),
    Row(name="config.json is a folder", spoil=directory("config.json"), says="has no config.json"),
    Row(name="config.json is empty", spoil=holds("config.json", b""), says="config.json is not JSON"),
    Row(name="config.json is cut off", spoil=holds("config.json", b'{"hidden_size": 4'), says="is not JSON"),
    Row(name="config.json is a list", spoil=holds("config.json", b"[]"), says="must be a JSON object"),
    Row(name="config.json is not UTF-8", spoil=holds("config.json", b'{"a": "\xff\xfe\xfa"}'), says="is not JSON"),
    Row(name="config.json nests 100,000 deep", spoil=holds("config.json", DEEP), says="is not JSON"),
    Row(name="a number is NaN", spoil=config(rms_norm_eps=float("nan")), says="NaN is not a number"),
    Row(name="a number is infinite", spoil=config(rms_norm_eps=float("inf")), says="Infinity is not a number"),
    Row(name="architectures missing", spoil=config(architectures=None), says="architectures is None"),
    Row(name="architectures of two", spoil=config(architectures=["A", "B"]), says="expected a list of one class name"),
    Row(name="an unknown architecture", spoil=config(architectures=["LamaForCausalLM"]), says="is not supported"),
    Row(name="auto_map and code of its own", spoil=own_code, says="'OwnForCausalLM' is not supported"),
    Row(name="an unknown attribute", spoil=config(attention_twist=0.5), says="attention_twist = 0.5 is not supported"),
    Row(name="a quantisation without a name", spoil=config(quantization_config={"bits": 4}), says="quant_method None"),
    Row(name="a quantisation that no tensor has", says="no tensor ends in .qweight",
        spoil=config(quantization_config={"quant_method": "gptq", "bits": 4})),
    Row(name="a size that is text", spoil=config(hidden_size="48"), says="hidden_size is '48'; expected int"),
    Row(name="a negative size", spoil=config(hidden_size=-48), says="it must be at least 1"),
    Row(name="a size beyond any model", spoil=config(hidden_size=2**40), says="it must be at most 2147483647"),
    Row(name="a billion layers", spoil=config(num_hidden_layers=10**9), says="it must be at most 2000"),
    Row(name="heads that do not divide", spoil=config(num_key_value_heads=3), says="must be a multiple"),
    Row(name="an unknown rope", spoil=config(rope_parameters={"rope_type": "spiral"}), says="spiral"),
    Row(name="an unknown activation", spoil=config(hidden_act="tan"), says="hidden_act 'tan' is not implemented"),
    # what the config says and the weights hold
    Row(name="another vocabulary than the embedding", spoil=config(vocab_size=321), says="expected [321, 48]"),
    Row(name="more layers than there are", spoil=config(num_hidden_layers=4), says="missing: layers.3."),
    Row(name="fewer layers than there are", spoil=config(num_hidden_layers=2), says="not part of the model"),
    Row(name="a head that is not there", spoil=config(tie_word_embeddings=False), says="lm_head.weight"),
    Row(name="a tensor missing", spoil=tensors(lambda held: held.pop(NORM)), says="missing: norm.weight"),
    Row(name="a tensor too many", spoil=tensors(lambda held: held.update(x=held[NORM])),
        says="not part of the model: x"),
    Row(name="integer weights", spoil=tensors(lambda held: held.update({NORM: np.ones(48, np.int8)})),
        says="quantised weights of this kind"),
    Row(name="a weight is NaN", spoil=tensors(last_nan), says=f"{NORM!r} of model.safetensors holds infinities or NaN"),
    # safetensors
    Row(name="no weights", spoil=without(SINGLE), says="neither *.safetensors nor pytorch_model*.bin"),
    Row(name="weights of no bytes", spoil=holds(SINGLE, b""), says="0 bytes"),
    Row(name="a git-lfs pointer", spoil=holds(SINGLE, LFS), says="git-lfs pointer"),
    Row(name="a web page", spoil=holds(SINGLE, b"<!doctype html><title>404</title>"), says="a web page"),
    Row(name="cut off in the length", spoil=cut(5), says="too few"),
    Row(name="cut off in the header", spoil=cut(100), says="cut off"),
    Row(name="cut off in the data", spoil=cut(-1), says="lie outside the file"),
    Row(name="a header of 2^63 bytes", spoil=header(lambda _: None, length=2**63), says="cannot be"),
    Row(name="a header that is not JSON", spoil=holds(SINGLE, struct.pack("<Q", 4) + b"{,,}"), says="is not JSON"),
    Row(name="a header that nests 100,000 deep", spoil=holds(SINGLE, struct.pack("<Q", len(DEEP)) + DEEP),
        says="is not JSON"),
    Row(name="a header that is not UTF-8", spoil=holds(SINGLE, struct.pack("<Q", 4) + b'"\xff\xfe"'),
        says="is not JSON"),
    Row(name="a tensor twice", spoil=holds(SINGLE, struct.pack("<Q", 15) + b'{"a":{},"a":{}}'),
        says="duplicate key 'a'"),
    Row(name="tensors that overlap", spoil=header(overlapping), says="overlap"),
    Row(name="an unknown dtype", spoil=entry(dtype="F31"), says="unknown dtype 'F31'"),
    Row(name="a dtype of another width", spoil=entry(dtype="F64"), says="takes 384 bytes"),
    Row(name="a negative shape", spoil=entry(shape=[-48]), says="is not a shape"),
    Row(name="a shape of 2^124 elements", spoil=entry(shape=[2**62, 2**62]), says="takes"),
    Row(name="an empty shape beyond bounds", spoil=entry(shape=[2**70, 0], data_offsets=[0, 0]), says="is not a shape"),
    Row(name="offsets beyond the file", spoil=entry(data_offsets=[2**62, 2**62 + 96]), says="lie outside the file"),
    Row(name="offsets backwards", spoil=entry(data_offsets=[96, 0]), says="lie outside the file"),
    Row(name="weights are a pipe", spoil=pipe(SINGLE), says="is a pipe, no file"),
    Row(name="weights are a folder", spoil=directory(SINGLE), says="is a folder, no file"),
    Row(name="weights are a device", spoil=link(SINGLE, "/dev/zero"), says="leaves the model's folder"),
    Row(name="a link out of the folder", spoil=link(SINGLE, "../outside"), says="leaves the model's folder"),
    Row(name="a link to itself", spoil=link(SINGLE, SINGLE), says="leads nowhere"),
    Row(name="an index that is not JSON", spoil=holds(INDEX, b"{"), says="is not an index of weight files"),
    Row(name="an index without a map", spoil=holds(INDEX, b"{}"), says="weight_map"),
    Row(name="an index that names a missing shard", spoil=index({"a": "2.safetensors"}),
        says="the download is incomplete"),
    Row(name="an index that leaves the folder", spoil=index({"a": "../outside"}), says="points outside its folder"),
    Row(name="an index of an absolute path", spoil=index({"a": "/etc/passwd"}), says="points outside its folder"),
    Row(name="an index of fewer tensors", spoil=index({NORM: SINGLE}), says="not listed in"),
    Row(name="an index that is a pipe", spoil=pipe(INDEX), says="is a pipe, no file"),
    # pytorch_model.bin
    Row(name="a pickle that calls os.system", spoil=system, says="global 'os.system' is refused"),
    Row(name="a pickle that imports by STACK_GLOBAL", spoil=torch(b"\x80\x02\x8c\x02os\x8c\x06system\x93."),
        says="opcode SHORT_BINUNICODE is refused"),
    Row(name="a pickle that unfolds 2^200 times", spoil=torch(BOMB), says="does not end with one dict"),
    Row(name="a pickle cut off", spoil=torch(b"\x80\x02}(X\x05\x00\x00\x00a"), says="malformed or cut off"),
    Row(name="a bare pickle of old",
        spoil=in_turn(without(SINGLE), holds(PT, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")),
        says="convert it to safetensors"),
    Row(name="a zip cut off", spoil=in_turn(without(SINGLE), holds(PT, b"PK\x03\x04" + bytes(60))),
        says="not a whole zip"),
    Row(name="a compressed zip", spoil=torch({"a": tensor(shape=(6,))}, method=8), says="compressed"),
    Row(name="a view beyond its storage", spoil=torch({"a": tensor(shape=(7,))}), says="reaches to element 6"),
    Row(name="a view of 2^40 repeats", spoil=torch({"a": tensor(shape=(2**40,), strides=(0,))}),
        says="repeated values"),
    Row(name="a storage shorter than it says", spoil=torch({"a": tensor(shape=(8,), storage=storage(count=8))}),
        says="should be 32 bytes and is 24"),
    Row(name="big-endian values", spoil=torch({"a": tensor(shape=(6,))}, byteorder=b"big"), says="byte order b'big'"),
    Row(name="weights in pickle that are not the model's", spoil=torch({"a": tensor(shape=(6,))}),
        says="does not fit its config.json"),
    # text
    Row(name="no tokenizer", spoil=without("tokenizer.json"), says="has no tokenizer.json"),
    Row(name="a broken tokenizer", spoil=holds("tokenizer.json", b'{"model": 3}'), says="cannot be read"),
    Row(name="a tokenizer config that nests 100,000 deep", spoil=holds("tokenizer_config.json", DEEP),
        says="cannot be read"),
    Row(name="a tokenizer that is a pipe", spoil=pipe("tokenizer.json"), says="has no tokenizer.json"),
    Row(name="a tokenizer config that is a pipe", spoil=pipe("tokenizer_config.json"), says="is no regular file"),
    Row(name="a generation config that is a pipe", spoil=pipe("generation_config.json"), says="is no regular file"),
    Row(name="a tokenizer larger than the embedding", spoil=other_tokenizer, says="the model's embedding has 100 rows"),
    Row(name="a generation config that is a list", spoil=holds("generation_config.json", b"[]"),
        says="must hold a JSON object"),
    Row(name="an impossible temperature", spoil=merged("generation_config.json", {"temperature": -1}),
        says="the model's sampling defaults are not valid"),
)
