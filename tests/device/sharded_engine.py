"""Run as a script on eight CPU devices: what an engine answers, keeps and sends at a tensor-parallel size.

    python sharded_engine.py '{"folder": …, "sizes": [1, 2], "whole_experts": false, "is_counted": true, "options": {}}'

Prints one JSON object: for each size the tokens, logprobs, bytes a device, and with `is_counted` the collectives of
each program.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from jaxserve import LLM, SamplingParams
from jaxserve.core.model_spec import LatentAttention
from jaxserve.flags import engine_config_from_kwargs
from jaxserve.models.registry import read_spec
from jaxserve.plan.devices import kind
from jaxserve.plan.sizes import Sizer
from jaxserve.runner.vocab import BLOCK
from tests.device.interpreted_kernels import OPS, interpret

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
SHAPED = SamplingParams(
    temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=5, max_tokens=12, ignore_eos=True, detokenize=False,
    presence_penalty=0.5, repetition_penalty=1.2, logit_bias={7: 2.0}, logprobs=3, prompt_logprobs=2,
)
COLLECTIVE = re.compile(r"= \S.*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def measure(
    folder: Path, size: int, *, whole_experts: bool, is_counted: bool, options: dict[str, Any]
) -> dict[str, Any]:
    prompts = [
        {"prompt_token_ids": case["prompt_token_ids"]}
        for case in json.loads((folder / "reference.json").read_text())["cases"]
    ]
    options = {
        "max_num_seqs": 6, "max_num_batched_tokens": 16, "block_size": 8, "kv_cache_memory_bytes": "1M",
        "enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32", "tensor_parallel_size": size,
        "enable_expert_parallel": whole_experts, **options,
    }
    config = engine_config_from_kwargs(str(folder), **options)
    sizer = Sizer(spec=read_spec(folder), folder=folder)
    if (drafting := config.scheduler.speculative_config) is not None:
        sizer.draft, sizer.draft_folder = read_spec(Path(drafting.model)), Path(drafting.model)
    with tempfile.TemporaryDirectory() as store, LLM(str(folder), compilation_cache_dir=store, **options) as llm:
        greedy = llm.generate(prompts + prompts[::-1], GREEDY, use_tqdm=False)
        shaped = llm.generate(prompts, SHAPED, use_tqdm=False)
        runner = llm._engine.runner
        setup, leaves, draft, stats = runner._setup, runner._leaves, runner._draft, llm._engine.stats
        of_draft = ((), ()) if draft is None else (draft._flat, draft._pages)
        return {
            "tokens": [list(answer.outputs[0].token_ids) for answer in greedy],
            "shaped": [list(answer.outputs[0].token_ids) for answer in shaped],
            "logprobs": [
                entry.logprob for answer in shaped for step in (answer.outputs[0].logprobs + answer.prompt_logprobs[1:])
                for entry in step.values()
            ],
            "scores": [
                step[token].logprob for answer, prompt in zip(shaped, prompts, strict=True)
                for step, token in zip(answer.prompt_logprobs[1:], prompt["prompt_token_ids"][1:], strict=True)
            ],
            "weight_bytes": held(
                leaves.begin, leaves.segments, leaves.finish, runner._head_leaves, of_draft[0]
            ),
            "planned_bytes": setup.memory.weight_bytes,
            "is_as_planned_without_devices":
                sizer.size(config, kind("CPU"), lambda *_: 0).setup.memory == setup.memory,
            "page_bytes": setup.memory.page_bytes,
            "pool_bytes": held(runner._state.kv, of_draft[1]),
            "planned_pool_bytes": setup.memory.pool_bytes,
            "drafts_accepted": sum(stats.draft_accepted_at) / max(1, stats.draft_tokens),
            "is_latent": isinstance(setup.spec.layers[0].attention, LatentAttention),
            "collectives": collectives(runner) if is_counted else {},
            "whole_rows": whole_rows(runner) if is_counted else {},
        }


def held(*trees: Any) -> int:
    """Bytes of these arrays on one device, each array once."""
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}.values()
    assert all(len({shard.data.shape for shard in array.addressable_shards}) == 1 for array in arrays)
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def collectives(runner: Any) -> dict[str, dict[str, int]]:
    """Program kind -> collective -> how many; the layers' kinds are summed over the calls of a step."""
    built, found = runner._builder, {}
    tokens, rows = built.token_buckets[-1], built.row_buckets[-1]
    forward = built.forward[tokens]
    found["begin"], found["finish"] = count(forward.begin), count(forward.finish)
    layers: Counter[str] = Counter()
    for segment in forward.segments:
        layers.update(count(forward.run_layers[segment.kind]))
    found["layers"], found["sample"] = dict(layers), count(built.sample[rows])
    found["score"] = count(built.score[tokens])
    return found


def whole_rows(runner: Any) -> dict[str, int]:
    """Program kind -> the most rows of whole logits that are in one array: of V columns, or of blocks of them."""
    built, setup, draft = runner._builder, runner._setup, runner._draft
    programs = {"sample": built.sample[built.row_buckets[-1]], "score": built.score[built.token_buckets[-1]]}
    if draft is not None:
        programs["draft"] = draft.write[max(draft.write)]
    vocab, filled = setup.shape.vocab_size, setup.spec.vocab_size * setup.mesh.size
    columns = {(vocab,), (filled,)}
    if vocab > BLOCK:       # a single block looks like a page of 128 numbers
        columns.add((-(-vocab // BLOCK), BLOCK))
    found = {}
    for name, program in programs.items():
        shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())
        sizes = [tuple(int(part) for part in text.split(",")) for text in shapes]
        found[name] = max(
            math.prod(size[: -len(of)]) for size in sizes for of in columns
            if size[-len(of) :] == of and size != (setup.shape.slot_count, vocab)     # the bias of shaping slots
        )
    return found


def count(executable: Any) -> dict[str, int]:
    return dict(Counter(COLLECTIVE.findall(executable.as_text())))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()
    task = json.loads(sys.argv[1])
    if task["options"].get("attention_backend") == "triton":
        traced = interpret()
    print(json.dumps({
        size: measure(
            Path(task["folder"]), size, whole_experts=task["whole_experts"] and size > 1, is_counted=task["is_counted"],
            options=task["options"],
        ) for size in task["sizes"]
    }))
    if task["options"].get("attention_backend") == "triton":
        assert traced.keys() == set(OPS), traced


if __name__ == "__main__":
    main()
