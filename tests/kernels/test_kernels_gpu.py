"""`make kernels-gpu` without a GPU: parts on tiny shapes, one that fails, the tables; no server package is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernels_pallas.eight_bit_matmul.cases import EightBitCase
from kernels_pallas.quantized_matmul.cases import PackedCase
from scripts import gpu_list, gpu_parts, kernels_gpu, part_process
from scripts.gpu_list import Part
from scripts.gpu_report import report
from scripts.part_process import in_process, in_turn

ROOT = Path(__file__).parents[2]
TINY = {"shape": "smollm2-135m", "changes": {"head_count": 4, "kv_head_count": 2, "head_dim": 16}}
CASES = {"paged_decode": TINY | {"rows": 3, "context": 33}, "paged_prefill": TINY | {"chunk": 20, "before": 17}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("op", "implementation", "codes"), [
    ("paged_decode", "xla", None), ("paged_decode", "triton", "int8"), ("paged_prefill", "triton", None),
])
def test_parts_run_interpreted(op: str, implementation: str, codes: str | None) -> None:
    given: dict[str, Any] = {"op": op, "implementation": implementation, "case": CASES[op], "codes": codes}
    result = gpu_parts.numerics(**given)
    assert result["finite"] and result["error"] < 0.02
    speed = gpu_parts.speed(**given)
    assert speed["ms"] > 0 and speed["gb_s"] > 0 and speed["tflop_s"] > 0


@pytest.mark.parametrize(("op", "case"), [
    ("quantized_matmul", PackedCase(
        model="tiny", code="int4", group=32, extra="offset", width=64, width_out=128, tokens=3
    )),
    ("eight_bit_matmul", EightBitCase(
        model="tiny", dtype="float8_e4m3fn", groups=2, width=64, width_out=128, tokens=3
    )),
])
def test_parts_of_products_run(op: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_parts.CASES, op, (case,))
    given: dict[str, Any] = {"op": op, "implementation": "xla", "case": case.name}
    result = gpu_parts.product_numerics(**given)
    assert result["finite"] and result["error"] < 0.01
    speed = gpu_parts.product_speed(**given)
    assert speed["times bf16"] == speed["bf16 ms"] / speed["ms"] and speed["gb_s"] > 0


def test_batch_invariance_is_told_of_xla() -> None:
    assert gpu_parts.invariance(implementation="xla", case=CASES["paged_decode"])["same_bits"]


def test_a_part_that_fails_or_hangs_is_a_result() -> None:
    def run(code: str, timeout_s: float = 20) -> dict[str, Any]:
        return in_process(["-c", code], timeout_s=timeout_s, environment=os.environ)

    assert run('print("noise"); print(\'{"ms": 1.0}\')') == {"ms": 1.0}
    assert run("import time; time.sleep(60)", 0.5) == {"error": "took longer than 0 s"}
    assert "boom" in run('raise RuntimeError("boom")')["error"]
    assert "printed no result" in run("pass")["error"]
    assert run('import os; print(\'{"ms": 1.0}\', flush=True); os.abort()') == {"ms": 1.0, "cut": "exit -6"}


ANSWERS = """
import os, time
from scripts.part_process import answer
class JaxRuntimeError(RuntimeError): pass
def run(asked):
    print("noise", flush=True)
    if asked == "hang": time.sleep(60)
    if asked == "die": os.abort()
    if asked == "fault": raise JaxRuntimeError("the device is broken")
    if asked == "refuse": raise ValueError("no such case")
    return {"asked": asked, "process": os.getpid()}
raise SystemExit(answer(run))
"""


def _asked(names: list[str], **limits: Any) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return list(in_turn(["-c", ANSWERS], list(map(json.dumps, names)), environment=environment, **limits))


def test_parts_in_turn_share_a_process_until_one_breaks_it() -> None:
    found = _asked(["a", "refuse", "b", "fault", "c", "die", "d"], timeout_s=20)
    assert [one.get("asked") for one in found] == ["a", None, "b", None, "c", None, "d"]
    assert found[0]["process"] == found[2]["process"] != found[4]["process"] != found[6]["process"]
    assert found[1]["error"] == "ValueError: no such case" and "broken" in found[3]["error"]
    assert found[5]["error"].startswith("exit -6")


def test_parts_that_all_die_or_hang_do_not_take_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_process, "START_S", 3.0)
    found = _asked(["a", "hang", "die", "die", "die", "die", "b"], timeout_s=0.5)
    assert found[1]["error"].startswith("took longer than 0 s") and "not tried" in found[-1]["error"]
    assert len(found) == 7
    assert len(_asked(["a", "hang", "b"], timeout_s=60, until=time.monotonic() + 3)) == 1


def test_tables_hold_shares_of_the_same_run_and_what_was_not_run() -> None:
    def part(kind: str, name: str) -> Part:
        return Part(kind=kind, name=name, given={})

    rate = {"of_read": 0.5, "of_dot": 0.1}
    step = {
        "host_ms": {"16": {"step": {"median": 2.0}, "host": {"median": 0.25}, "rate": rate}},
        "device_ms": {"512": {"median": 9.0} | rate},
    }
    life = {
        "tokens_s": {"1": 100.0, "16": 900.0}, "serving_s": 4.0, "ready_s": 9.0, "compiled": 0, "programs": 21,
        "compiled_after_ready": 0, "peak_gib": 100.0, "limit_gib": 126.0, "fraction": "0.9",
    }
    large = {
        "op": "paged_decode", "implementation": "mosaic_gpu", "codes": None, "case": {"rows": 16, "context": 2048},
    }
    table = report([
        (part("ceilings", "ceilings"), {"device": "NVIDIA H200", "copy_gb_s": 4000.0, "matmul_tflop_s": 700.0}),
        (part("numerics", "n"), {"error": 0.001, "finite": True}),
        (part("speed", "s"), {"ms": 0.5, "gb_s": 3600.0, "tflop_s": 70.0}),
        (part("speed", "t"), {"error": "Traceback\nRuntimeError: no | such"}),
        (Part(kind="speed", name="u", given=large), {"ms": 0.5, "gb_s": 3600.0, "tflop_s": 70.0}),
        (Part(kind="speed", name="v", given=large), {"ms": 0.6, "gb_s": 3300.0, "tflop_s": 60.0}),
        (part("step", "m"), step),
        (part("step", "g"), step | {"busy_ms": {"16": 1.75}}),
        (part("step", "f"), step | {"busy_ms": {"16": "no trace: it has no kernel"}}),
        (part("life", "w"), life),
        (part("life", "h"), {"tokens_s": {"1": 30.0}}),
    ])
    assert "device NVIDIA H200; copy_gb_s 4000" in table
    assert "| n | 0.001 | True |" in table
    assert "| s | 0.5 | 3600 | 90% | 70 | 10% |  |" in table
    assert "| u | 0.5 | 3600 | 90% | 70 | 10% | 85%: met |" in table and "85%: missed |" in table
    assert "| g | 16 rows | 2 | 1.75 | 0.25 |" in table
    assert "| f | not run: 16 rows: no trace: it has no kernel |" in table
    assert "| w | 4 | 9 | 0 of 21, 0 after ready | 1: 100, 16: 900 | 100.0 of 126.0 (fraction 0.9) |" in table
    assert "| h |  |  |  | 1: 30 |  |" in table
    assert "| t | not run: RuntimeError: no / such |" in table
    products = report([
        (part("product_speed", "p"), {"ms": 0.5, "gb_s": 3600.0, "tflop_s": 70.0, "bf16 ms": 1.5, "times bf16": 3.0}),
    ])
    assert "| p | 0.5 | 3600 | 70 | 1.5 | 3 |" in products
    assert "| m | 16 rows | 2 | 0.25 | 50% | 10% |" in table and "| m | 512 tokens | 9 |" in table


def test_the_list_needs_neither_server_nor_gpu(tmp_path: Path) -> None:
    code = (
        "import sys, scripts.kernels_gpu, scripts.gpu_list as k, scripts.gpu_parts; "
        "print(len(k.parts()), sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60, check=True,
    )
    for absent in ("fastapi", "pytest", "uvicorn", "transformers", "jaxserve.server", "jaxserve.engine"):
        assert f"'{absent}'" not in done.stdout
    assert len({(part.kind, part.name) for part in gpu_list.parts()}) == int(done.stdout.split()[0]) > 100
    step = next(part for part in gpu_list.parts() if part.kind == "step" and not part.given["has_buffers"])
    words, own = gpu_list.command(step, tmp_path)
    assert gpu_list.NO_COMMAND_BUFFERS in own["XLA_FLAGS"] and "--attention-backend" in words
    code = "import sys, scripts.gpu_life; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60, check=True,
    )
    for absent in ("msgspec", "tokenizers", "jinja2", "fastapi", "transformers"):     # an engine needs none of them
        assert f"'{absent}'" not in done.stdout
    lives = [part for part in gpu_list.parts() if part.kind == "life" and part.given["model"] == "SmolLM2-135M"]
    for kept, part in zip((0, 1, 2), lives, strict=False):      # what a start finds of the one before
        for old in ("life-SmolLM2-135M", "choices-SmolLM2-135M"):
            (tmp_path / old / "left").mkdir(parents=True, exist_ok=True)
        words, own = gpu_list.command(part, tmp_path)
        assert bool(gpu_list.unready(part, tmp_path)) == (not kept and part.given["start"] != "cold")
        assert len(list(tmp_path.glob("*/left"))) == kept, part.name
        assert "smollm2-135m.yaml" in words and str(tmp_path / "choices-SmolLM2-135M") in own["XLA_FLAGS"]
        assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in own
    assert json.loads((tmp_path / step.given["model"] / "config.json").read_text())["architectures"]


class _Fake:
    """Stands for processes: parts that ran, and what they say."""

    def __init__(self, device: str) -> None:
        self.device, self.ran = device, []

    def in_turn(self, command: list[str], given: list[str], **_: Any) -> Iterator[dict[str, Any]]:
        for part in map(json.loads, given):
            self.ran.append(part["kind"])
            ceilings = {"device": self.device, "copy_gb_s": 3000.0, "matmul_tflop_s": 700.0}
            yield ceilings if part["kind"] == "ceilings" else {"same_bits": True, "difference": 0.0}

    def in_process(self, command: list[str], **_: Any) -> dict[str, Any]:
        self.ran.append("alone")
        time.sleep(0.6)
        return {"host_ms": {}, "device_ms": {}, "cut": "took longer than 1 s"}


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_a_run_is_taken_up_where_it_ended_on_the_same_device(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(device: str, *words: str) -> list[str]:
        fake = _Fake(device)
        monkeypatch.setattr(kernels_gpu, "in_turn", fake.in_turn)
        monkeypatch.setattr(kernels_gpu, "in_process", fake.in_process)
        output = ["--output", str(tmp_path / "found"), "--copy", str(tmp_path / "away"), "--only", *words]
        monkeypatch.setattr(sys, "argv", ["kernels_gpu.py", *output])
        assert kernels_gpu.main() == 0
        return fake.ran

    (tmp_path / "away").mkdir()
    assert run("NVIDIA H100 80GB HBM3", "ceilings", "invariance", "--seconds", "9") == ["ceilings", *["invariance"] * 3]
    assert run("NVIDIA H100 80GB HBM3", "step", "--match", "Llama", "--seconds", "9", "--resume") == ["ceilings"]
    again = run(device, "invariance", "--resume", "--seconds", "9")
    assert again == (["ceilings"] if "H100" in device else ["ceilings", *["invariance"] * 3])
    assert (tmp_path / "found-before.json").exists() == ("H200" in device)
    assert (tmp_path / "away" / "found.md").read_text() == (tmp_path / "found.md").read_text()
    kinds = [entry["part"]["kind"] for entry in json.loads((tmp_path / "away" / "found.json").read_text())]
    assert sorted(kinds) == ["ceilings", *["invariance"] * 3]
    monkeypatch.setattr(kernels_gpu, "LEAST_S", {})
    # What the run's end cut short is kept, and tried again; what took too long by itself is not.
    for seconds, cut, then in (("0.5", kernels_gpu.OVER, 1), ("9", "took longer than 1 s", 1), ("9", "", 0)):
        ran = run(device, "step", "--match", "Llama-3.1-8B xla, command", "--seconds", seconds, "--resume")
        assert ran == ["ceilings", *["alone"] * then]
        found = json.loads((tmp_path / "found.json").read_text())
        assert not cut or found[-1]["found"]["cut"] == cut
