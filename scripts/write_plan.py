"""Writes the tables of docs/plan.md: two large models planned, and weak scaling from 1 to 64 GPUs; and that of
docs/guide.md, what each of several devices keeps.

    make docs                                 # among the other pages
    python -m scripts.write_plan --check      # exit 1 where the page is not what this version computes

Temporaries are by formula, so that the page is the same on every machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxserve.core.model_spec import ModelSpec
from jaxserve.flags import engine_config_from_kwargs
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import read_spec, spec_from_config
from jaxserve.plan.__main__ import model_folder
from jaxserve.plan.devices import Devices, parse_devices
from jaxserve.plan.planner import Plan, Question, plan, running
from jaxserve.plan.report import lines, memory_rows, rate_rows
from jaxserve.plan.roofline import Roofline, Step
from jaxserve.plan.sizes import Sizer
from jaxserve.plan.temporaries import estimate
from jaxserve.sharding.mesh import abstract_mesh
from jaxserve.sharding.split import device_spec
from jaxserve.start_report import size as shown_size
from tests.device.hub_configs import HUB

DOCS = Path(__file__).parents[1] / "docs"
PAGE, GUIDE = DOCS / "plan.md", DOCS / "guide.md"
LLAMA_8B, LLAMA_70B, LLAMA_405B = (f"meta-llama/Llama-3.1-{size}-Instruct" for size in ("8B", "70B", "405B"))
DEEPSEEK = "DeepSeek-V3-bf16"
BATCH, CONTEXT = 32, 4096       # of each GPU in the scaling tables
RATES = (
    "| step | of | ms | products / memory / messages, ms | tokens/s | limit | messages |\n"
    "|---|---|---|---|---|---|---|"
)
SCALING = "| GPUs | replicas x devices | sequences | step ms, of it messages | tokens/s | a GPU | of the first row |"


@dataclass(kw_only=True, slots=True)
class Planner:
    """Plans one shipped shape. Mutable: keeps what the sizer keeps."""

    model: str
    sizer: Sizer

    @classmethod
    def of(cls, model: str) -> Planner:
        folder = model_folder(model, engine_config_from_kwargs(model))
        return cls(model=model, sizer=Sizer(spec=read_spec(folder), folder=folder))

    def plan(
        self, devices: Devices, size: int, *, whole_experts: bool = False, sequences: int | None = None
    ) -> Plan:
        config = engine_config_from_kwargs(
            self.model, tensor_parallel_size=size, enable_expert_parallel=whole_experts, max_num_seqs=sequences
        )
        question = Question(model=self.model, config=config, devices=devices, context=CONTEXT)
        return plan(question, self.sizer, estimate, "formula")


def planned(model: str, devices: str, *, whole_experts: bool = False) -> str:
    """A plan as a section's text."""
    where = parse_devices(devices)
    found = Planner.of(model).plan(where, where.count, whole_experts=whole_experts)
    flag = " --enable-expert-parallel" if whole_experts else ""
    return "\n".join([
        f"    jaxserve plan {model} --devices {devices}{flag}", "",
        *(f"- {name}: {value}" for name, value in lines(found)), "",
        "| each device's memory | | |", "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in memory_rows(found)), "",
        "| sequences of tokens | at once |", "|---|---|",
        *(f"| {length:,} | {count:,} |" for length, count in found.fits), "",
        f"At most, with sequences of {found.context:,} tokens:", "", RATES,
        *(f"| {' | '.join(row)} |" for row in rate_rows(found)),
    ])


def scaling(model: str, counts: Sequence[int], size: int | None) -> str:
    """Rows of growing numbers of H200, equally many sequences each; `size` devices a replica, None: all of them."""
    planner, rows = Planner.of(model), list[str]()
    first = None
    for count in counts:
        devices = Devices(kind=parse_devices("H200").kind, per_host=min(count, 8), hosts=max(1, count // 8))
        each = size or count
        found = planner.plan(devices, each, sequences=BATCH * each)
        batch = running(found.memory, CONTEXT, BATCH * each)
        bound = Roofline(sized=found.sized, devices=devices).bound(Step.decode(batch, CONTEXT))
        assert bound is not None
        rate = bound.tokens_s / each
        first = first or rate
        rows.append(
            f"| {count} | {count // each} x {each} | {batch * count // each:,} | {bound.seconds * 1e3:.2f}, "
            f"{bound.messages_s * 1e3:.2f} | {rate * count:,.0f} | {rate:,.0f} | {rate / first:.0%} |"
        )
    return "\n".join([SCALING, "|---" * 7 + "|", *rows])


def kept(name: str, spec: ModelSpec, *, whole_experts: bool = False) -> str:
    """A row: bytes of weights and of a token's keys and values that a device has, in bfloat16, on 1 to 8 devices."""
    cells, alone = [], dict[str, int]()
    for count in (1, 2, 4, 8):
        mesh = abstract_mesh(count, has_whole_experts=whole_experts and count > 1)
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(spec, "bfloat16", mesh))
        held = {jax.tree_util.keystr(path): 2 * math.prod(of.sharding.shard_shape(of.shape)) for path, of in leaves}
        alone = alone or held
        whole = sum(size for path, size in held.items() if size == alone[path])
        token = sum(group.page_bytes(1, 2) for group in device_spec(spec, mesh).kv_groups)
        cells.append(f"{shown_size(sum(held.values()))}, {shown_size(token)}")
    return f"| {name} | {shown_size(whole)} | {' | '.join(cells)} |"


def parts() -> str:
    """What each of several devices keeps."""
    rows = []
    for title, model in (("Llama-3.1-8B (8 kv heads)", LLAMA_8B), ("Llama-3.1-70B (8)", LLAMA_70B)):
        rows.append(kept(title, read_spec(model_folder(model, engine_config_from_kwargs(model)))))
    for title, name in (
        ("Qwen2.5-7B (4)", "Qwen2.5-7B"), ("Gemma 3 4B (4)", "gemma-3-4b"),
        ("Qwen3-30B-A3B (4), experts split", "Qwen3-30B-A3B"),
    ):
        rows.append(kept(title, spec_from_config(HUB[name])))
    rows.append(kept("Qwen3-30B-A3B (4), experts whole", spec_from_config(HUB["Qwen3-30B-A3B"]), whole_experts=True))
    rows.append(kept("DeepSeek-V2-Lite (latent)", spec_from_config(HUB["DeepSeek-V2-Lite"])))
    return "\n".join(["| model | of it on every device | 1 device | 2 | 4 | 8 |", "|---" * 6 + "|", *rows])


def sections() -> Iterator[tuple[str, str]]:
    """Marker and text of each computed part of the page."""
    yield "405B", planned(LLAMA_405B, "2x8xH200")
    yield "DeepSeek-V3", planned(DEEPSEEK, "2x8xH200", whole_experts=True)
    counts = (1, 2, 4, 8, 16, 32, 64)
    yield "8B replicas", scaling(LLAMA_8B, counts, 1)
    yield "8B split", scaling(LLAMA_8B, counts, None)
    yield "70B replicas", scaling(LLAMA_70B, counts[3:], 8)
    yield "70B split", scaling(LLAMA_70B, counts[1:], None)


def guide_sections() -> Iterator[tuple[str, str]]:
    yield "parts", parts()


def written(page: str, computed: Iterable[tuple[str, str]]) -> str:
    """The page with its computed parts anew."""
    for name, text in computed:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        if not rest:
            raise RuntimeError(f"the page lacks {begin}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    is_check, differs = parser.parse_args().check, False
    for path, computed in ((PAGE, sections()), (GUIDE, guide_sections())):
        page = path.read_text(encoding="utf-8")
        new = written(page, computed)
        differs |= new != page
        if not is_check:
            path.write_text(new, encoding="utf-8")
    return int(is_check and differs)


if __name__ == "__main__":
    sys.exit(main())
