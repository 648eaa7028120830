"""ablate.py on a tiny model: a run that is interrupted goes on where it stopped, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
GRID = {
    "about": "Two cells, one load.",
    "engine": {
        "dtype": "float32", "max-model-len": 64, "max-num-seqs": 2, "max-num-batched-tokens": 16,
        "kv-cache-memory-bytes": "1M", "enforce-eager": True,
    },
    "switches": {"batching": ["continuous", "static"]},
    "workloads": {"small": {"num-prompts": 4, "input-len": 8, "output-len": 6, "token-low": 5, "token-high": 90}},
    "repeats": 1, "warmup": 1,
    "figures": [{"x": "batching", "y": "median_ttft_ms"}, {"x": "median_ttft_ms", "y": "p99_itl_ms"}],
}


def rows(output: Path) -> list[dict]:
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


@pytest.mark.timeout(300)
def test_an_interrupted_run_goes_on_and_ends_with_a_report(tiny_llama, compile_cache, tmp_path):
    config, output = tmp_path / "two.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(GRID))
    command = [
        sys.executable, str(ROOT / "scripts" / "ablate.py"), "--config", str(config), "--model", str(tiny_llama),
        "--output", str(output), "--compilation-cache-dir", str(compile_cache),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not rows(output) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=90)
    assert "interrupted; the same command goes on" in said, said
    assert [row["flags"]["batching"] for row in rows(output)] == ["continuous"]
    kept = (output / "results.jsonl").read_text()
    (output / "results.jsonl").write_text(kept + kept[:40])     # as a crash in the midst of a line leaves it

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    lines = (output / "results.jsonl").read_text().splitlines()
    assert lines[0] + "\n" == kept and json.loads(lines[2])["flags"]["batching"] == "static" and len(lines) == 3
    figures = json.loads(lines[2])["figures"]
    assert figures["completed"] == 4 and figures["total_output_tokens"] == 24 and figures["compiled_after_ready"] == 0
    summary = (output / "summary.md").read_text()
    assert "2 of 2 measurements" in summary and "| batching=static | 1 |" in summary and "×" in summary
    assert all((output / f"two-{number}.png").read_bytes().startswith(b"\x89PNG") for number in (1, 2))
