"""`jaxserve plan --devices 8xH200 [MODEL] [--config FILE.yaml] [flags of serve]`: the command line of planning.

Reads config.json and nothing else of a model, and touches no accelerator. Every flag of `serve` means here what it
means there. Exit status: 0 it fits, 1 it does not or the model cannot be served, 2 for a wrong flag.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.flags import command_line
from jaxserve.flags.build import serve_config
from jaxserve.flags.config_file import SHIPPED, read_config
from jaxserve.plan.devices import Devices, parse_devices

USAGE = """\
usage: jaxserve plan --devices [[MACHINES x] COUNT x] KIND [MODEL] [--config FILE.yaml] [flags]
       python -m jaxserve.plan ...

Says what a model takes on devices that need not be here, how many sequences fit and how fast steps can be at most;
or why it does not fit, and what does. Needs no GPU and no weights: MODEL is a folder with a config.json, a name of
which the shape is shipped, or a hub name (only its small files are fetched).

  jaxserve plan --config llama3-70b.yaml --devices 8xH200
  jaxserve plan --config deepseek-v3.yaml --devices 2x8xH200 --enable-expert-parallel

  --devices       H200, H100, A100-80G, A100-40G, L40S, L4, B200, MI300X, RTX4090, CPU (this machine)
  --context N     tokens of each sequence in the rates; default 4096, or as long as fits
  --temporaries   auto: by the GPU's compiler where jax's CUDA plugin is installed; compile: or fail; formula
  --json          one JSON object

All flags of `jaxserve serve` hold (jaxserve serve --help). Without --tensor-parallel-size all devices share one model;
with a smaller one the rest are replicas.
"""
OWN = ("--devices", "--context", "--temporaries")
TEMPORARIES = ("auto", "compile", "formula")


@dataclass(kw_only=True, slots=True)
class _Own:
    """The command's own flags. Mutable while they are read."""

    devices: str | None = None
    context: int | None = None
    temporaries: str = "auto"
    as_json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    try:
        own, rest = _own(words)
        config, devices = _configuration(own, rest)
    except ConfigError as error:
        print(f"jaxserve plan: error: {error}", file=sys.stderr)
        return 2
    try:
        return _answer(own, config, devices)
    except JaxserveError as error:
        print(f"jaxserve plan: error: {error}", file=sys.stderr)
        return 1


def _own(words: list[str]) -> tuple[_Own, list[str]]:
    own, rest = _Own(), []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--json":
            own.as_json = True
        elif name in OWN:
            if not equals:
                if not words:
                    raise ConfigError(f"{name} needs a value")
                value = words.pop(0)
            _set(own, name, value)
        else:
            rest.append(word)
    return own, rest


def _set(own: _Own, name: str, value: str) -> None:
    if name == "--devices":
        own.devices = value
    elif name == "--temporaries":
        if value not in TEMPORARIES:
            raise ConfigError(f"temporaries must be one of {', '.join(TEMPORARIES)}, got {value!r}")
        own.temporaries = value
    else:
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"context must be a number of tokens, at least 1, got {value!r}")
        own.context = int(value)


def _configuration(own: _Own, words: list[str]) -> tuple[EngineConfig, Devices]:
    if own.devices is None:
        raise ConfigError("say which devices: --devices 8xH200")
    devices = parse_devices(own.devices)
    line = command_line.read(words)
    if line.help is not None or line.version:
        raise ConfigError("--help stands alone here: jaxserve plan --help, jaxserve serve --help")
    raw = (read_config(line.config) if line.config is not None else {}) | line.values
    for name in ("nnodes", "node-rank", "master-addr", "master-port"):
        raw.pop(name, None)     # which machine this is means nothing here; --devices says how many there are
    replicas = serve_config(raw).engine.parallel.data_parallel_size
    raw.setdefault("tensor-parallel-size", max(1, devices.count // replicas))
    config = serve_config(raw).engine
    size = config.parallel.tensor_parallel_size
    if devices.count % size:
        raise ConfigError(f"tensor-parallel-size {size} does not divide the {devices.count} devices of {devices}")
    if "data-parallel-size" in raw and size * replicas != devices.count:
        raise ConfigError(
            f"tensor-parallel-size {size} times data-parallel-size {replicas} is not the {devices.count} devices of "
            f"{devices}"
        )
    return config, devices


def _answer(own: _Own, config: EngineConfig, devices: Devices) -> int:
    import jax

    # What is planned for is not here, and what is here must stay free: shapes need no device.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("jax").setLevel(logging.ERROR)
    from rich.console import Console

    from jaxserve.models.draft import check_draft
    from jaxserve.models.registry import read_spec
    from jaxserve.plan import report
    from jaxserve.plan.planner import Plan, Question, plan_or_refuse
    from jaxserve.plan.sizes import Sizer
    from jaxserve.plan.temporaries import compile_only_mesh, compiled, compiler_for, estimate

    folder = model_folder(config.model.model, config)
    sizer = Sizer(spec=read_spec(folder, config.model.hf_overrides), folder=folder)
    speculative = config.scheduler.speculative_config
    if speculative is not None and speculative.model is not None:
        sizer.draft_folder = model_folder(speculative.model, config)
        sizer.draft = read_spec(sizer.draft_folder)
        check_draft(sizer.spec, sizer.draft, folder=folder, draft_folder=sizer.draft_folder)
    why_not = compiler_for(devices.kind)
    if own.temporaries == "compile" and why_not is not None:
        raise ConfigError(f"temporaries compile: {why_not}; use --temporaries formula")
    measure, by, mesh = estimate, "formula", None
    if own.temporaries != "formula" and why_not is None:
        measure, by = compiled, "compiler"
        mesh = compile_only_mesh(
            devices.kind, config.parallel.tensor_parallel_size,
            has_whole_experts=config.parallel.enable_expert_parallel,
        )
    question = Question(model=config.model.model, config=config, devices=devices, context=own.context)
    answer = plan_or_refuse(question, sizer, measure, by, mesh, estimate)
    if own.as_json:
        print(json.dumps(report.to_json(answer), indent=2))
    else:
        report.show(answer, Console(width=None if sys.stdout.isatty() else report.WIDTH))
    return 0 if isinstance(answer, Plan) else 1


def model_folder(model: str, config: EngineConfig) -> Path:
    """A folder with the model's config.json: the user's own, a shipped shape, or the hub's small files."""
    from jaxserve.weights.source import locate

    if not Path(model).expanduser().is_dir():
        for shipped in SHIPPED:
            folder = shipped / "shapes" / model.replace("/", "--")
            if (folder / "config.json").is_file():
                return folder
    return locate(
        model, revision=config.model.revision, token=config.model.hf_token,
        download_dir=config.load.download_dir, load_format="dummy",
    )


if __name__ == "__main__":
    sys.exit(main())
