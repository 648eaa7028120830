"""--help: fits the screen, names everything, and is quick; so are errors. The reference page is current."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.flags.help import render
from jaxserve.flags.table import FLAGS, PARTS
from scripts.write_configuration import PAGE, page

SCREEN = (40, 110)   # lines, columns
ROOT = Path(__file__).parents[2]


def run(*words: str, module: str = "jaxserve.serve") -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    return done, time.perf_counter() - start


def test_the_overview_fits_a_screen_and_names_every_flag() -> None:
    lines = render("").splitlines()
    assert len(lines) <= SCREEN[0] and max(map(len, lines)) <= SCREEN[1]
    for flag in FLAGS:
        assert f"--{flag.name}" in render("") or f"--[no-]{flag.name}" in render("")


@pytest.mark.parametrize("part", PARTS)
def test_a_group_fits_a_screen(part: str) -> None:
    lines = render(part).splitlines()
    assert len(lines) <= SCREEN[0] and max(map(len, lines)) <= SCREEN[1]


def test_all_and_single_flags() -> None:
    everything = render("all")
    for flag in FLAGS:
        text = render(f"--{flag.name}")
        assert text == render(f"--{flag.field}") and text in everything and flag.help.split(";")[0][:60] in text
        assert flag.name in PARTS or text == render(flag.name)
    assert "[0.92]" in render("gpu-memory-utilization") and "[on]" in render("async-scheduling")
    assert "-tp" in render("tensor-parallel-size") and "[auto]" in render("max-model-len")


def test_unknown_topics() -> None:
    with pytest.raises(ConfigError, match="no help on 'cachee'.*groups are model, load, cache"):
        render("cachee")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    runs = [run("--help") for _ in range(3)]
    assert all(done.returncode == 0 and done.stdout.startswith("usage:") for done, _ in runs)
    assert min(seconds for _, seconds in runs) < 1.5
    done, _ = run("serve", "--help=cache", module="jaxserve.cli")
    assert done.returncode == 0 and "--block-size" in done.stdout


@pytest.mark.parametrize("words", [("m", "--blocksize", "16"), ("m", "--config", "nope.yaml"), ("m", "--port", "0")])
def test_errors_are_quick_and_exit_2(words: tuple[str, ...]) -> None:
    runs = [run(*words) for _ in range(2)]
    assert min(seconds for _, seconds in runs) < 2.0
    for done, _ in runs:
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("jaxserve: error: ") and len(done.stderr.splitlines()) == 1


def test_the_command_knows_its_verbs() -> None:
    done, _ = run("sevre", "m", module="jaxserve.cli")
    assert done.returncode == 2 and "unknown verb 'sevre'" in done.stderr and "jaxserve serve" in done.stderr
    done, _ = run("--version", module="jaxserve.cli")
    assert done.returncode == 0 and done.stdout == run("--version")[0].stdout == "0.1.0\n"
    done, _ = run(module="jaxserve.cli")
    assert done.returncode == 0 and "jaxserve serve [MODEL]" in done.stdout


def test_parsing_imports_neither_jax_nor_numpy() -> None:
    code = (
        "import sys; from jaxserve.flags import parse_serve_args; parse_serve_args(['m', '--config', 'qwen3b.yaml']);"
        "print(sorted({'jax', 'numpy', 'pydantic', 'fastapi', 'rich', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_reference_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
