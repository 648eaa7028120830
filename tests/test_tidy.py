"""The house rules, held by reading the source: sizes, names, the import law, array axes, links that resolve."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from jaxserve.core.dims import DIMS

ROOT = Path(__file__).parents[1]
FOLDERS = ("jaxserve", "kernels_pallas", "scripts", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGES = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("jaxserve", "kernels_pallas")]
PROSE = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "fixtures" / "README.md"])

FILE_LINES_MAX, KERNEL_LINES_MAX, FUNCTION_LINES_MAX = 400, 600, 60
BANNED_MODULES = {"utils", "util", "common", "helpers", "helper", "misc"}
BANNED_CLASSES = re.compile(r"Manager$|^Base[A-Z]|[a-z]Base$|^Abstract[A-Z]|Helper$|Utils?$")
MACHINE_PATHS = re.compile(r"/(?:work|root|tmp)/[a-z]")
ENTRY_POINTS = {"jaxserve.cli", "jaxserve.serve", "jaxserve.engine_process", "jaxserve.llm"}
CONTROL_PLANE = ("core", "engine", "text", "server", "flags", "text_engine", "serve", "cli", "supervisor")
DATA_PLANE = ("jax", "jaxlib", "flax", "kernels_pallas", "torch", "transformers")


def name_of(path: Path) -> str:
    """How pytest and messages call a file."""
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: Path, *kinds: type) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, kinds))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    allowed = KERNEL_LINES_MAX if "kernels_pallas" in path.parts else FILE_LINES_MAX
    assert len(path.read_text(encoding="utf-8").splitlines()) <= allowed
    for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        assert node.end_lineno - node.lineno < FUNCTION_LINES_MAX, node.name


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_say_what_they_are_and_are_named_for_it(path: Path) -> None:
    assert path.stem not in BANNED_MODULES
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(tree_of(path)), "a module begins with what it owns"
    for node in nodes(path, ast.ClassDef):
        assert isinstance(node, ast.ClassDef) and not BANNED_CLASSES.search(node.name), node.name


def test_nothing_left_undone_without_its_issue() -> None:
    marker = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
    for path in (*PYTHON, *PROSE, *(ROOT / "configs").rglob("*.yaml"), ROOT / "Makefile", ROOT / "pyproject.toml"):
        if path != Path(__file__):
            found = marker.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name_of(path)}: {found}"


def test_no_file_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name] or [*PYTHON, *PROSE]
    for path in paths:
        if path.suffix in (".safetensors", ".bin") or path == Path(__file__) or not path.is_file():
            continue
        found = MACHINE_PATHS.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{name_of(path)}: {found}"


def axes_of(name: str) -> str | None:
    """The axes that a name ends in, or None. Constants are no arrays; `_T` alone is none either."""
    match = re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z]+)", name)
    return match[1] if match else None


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_arrays_end_in_axes_of_the_key(path: Path) -> None:
    for node in nodes(path, ast.Name, ast.arg, ast.Attribute, ast.keyword):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
        axes = axes_of(name or "")
        assert axes is None or set(axes) <= set(DIMS), f"{name} in line {node.lineno}"


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_einsum_strings_are_the_axes_of_their_arrays(path: Path) -> None:
    for node in nodes(path, ast.Call):
        assert isinstance(node, ast.Call)
        if not (isinstance(node.func, ast.Attribute) and node.func.attr == "einsum"):
            continue
        assert isinstance(node.args[0], ast.Constant), f"line {node.lineno}: write the subscripts out"
        inputs, _, output = str(node.args[0].value).partition("->")
        assert set(inputs + output) <= {*DIMS, ",", "."}, node.args[0].value
        for subscripts, operand in zip(inputs.split(","), node.args[1:], strict=True):
            axes = axes_of(ast.unparse(operand).rpartition(".")[2])
            assert axes is None or axes == subscripts, f"{ast.unparse(operand)} is not {subscripts}"


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules that a file imports anywhere in it, but under TYPE_CHECKING; names from packages as if modules."""
    branches = [node for node in nodes(path, ast.If) if isinstance(node, ast.If)]
    typing_only = {
        id(inner) for node in branches if "TYPE_CHECKING" in ast.unparse(node.test) for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name_of(path)}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def is_control_plane(path: Path) -> bool:
    parts = module_of(path).split(".")
    return parts[0] == "jaxserve" and len(parts) > 1 and parts[1] in CONTROL_PLANE


@pytest.mark.parametrize("path", [path for path in PACKAGES if is_control_plane(path)], ids=name_of)
def test_the_control_plane_imports_no_data_plane(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & set(DATA_PLANE)


def test_importing_the_whole_control_plane_loads_no_jax() -> None:
    modules = sorted(module_of(path) for path in PACKAGES if is_control_plane(path))
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout.strip().splitlines()[-1])}
    assert "jaxserve" in loaded and not loaded & set(DATA_PLANE)


def test_kernels_know_jax_only() -> None:
    for path in PACKAGES:
        if module_of(path).startswith("kernels_pallas"):
            roots = {name.split(".")[0] for name in imports_of(path)}
            native = {"llvmlite"} if module_of(path) == "kernels_pallas.native.host" else set()
            assert roots <= {"jax", "numpy", "kernels_pallas", *native, *sys.stdlib_module_names}, name_of(path)


def test_no_module_is_dead() -> None:
    used: set[str] = set(ENTRY_POINTS)
    for path in PYTHON:
        used |= {name for name in imports_of(path) if name != module_of(path)}
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGES)
    for path in PACKAGES:
        module = module_of(path)
        is_named = f'"{module}"' in text   # loaded by name: lazily, or as a process of its own
        is_package = path.name == "__init__.py"
        assert module in used or is_named or (is_package and any(name.startswith(module) for name in used)), module


def test_no_script_or_config_is_dead() -> None:
    readers = [*PYTHON, *PROSE, ROOT / "Makefile", *(ROOT / "scripts").iterdir(), *(ROOT / ".ci").iterdir()]
    for path in [*(ROOT / "scripts").glob("*.*"), *(ROOT / "configs").rglob("*.yaml")]:
        others = (reader for reader in readers if reader != path and reader.is_file())
        assert any(re.search(rf"\b{path.stem}\b", other.read_text(encoding="utf-8")) for other in others), name_of(path)


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_files_that_prose_names_exist(path: Path) -> None:
    folders = "jaxserve|kernels_pallas|scripts|tests|docs|configs|deploy"
    for named in re.findall(rf"`((?:{folders})/[\w./-]+)`", path.read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), named


def test_every_page_is_reachable_and_in_the_site() -> None:
    pages = {name_of(path) for path in PROSE if path.parent.name in ("docs", "decisions")}
    listed = re.findall(r": ([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {f"docs/{name}" for name in listed} == pages


def test_decisions_are_numbered_in_a_row_and_titled() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{number:04}" for number in range(1, len(decisions) + 1)]
    for path in decisions:
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", path.name)
        assert path.read_text(encoding="utf-8").startswith(f"# {path.name[:4]}"), f"{path.name} opens with its number"


def test_make_help_lists_every_verb_and_each_does_something() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split())
    explained = set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    assert phony == explained
    for script in re.findall(r"scripts/[\w.]+", text):
        assert (ROOT / script).is_file(), script
