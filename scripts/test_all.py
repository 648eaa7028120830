"""Runs every test, the slow ones too, and records the outcome in docs/test-all.md: when, where, how long, the slowest.

Arguments go to pytest; a run that selects tests by any is not recorded. Ends as pytest does.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "test-all.md"
SLOWEST = 15


def main() -> int:
    """Runs pytest with its output passed on line by line."""
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", f"--durations={SLOWEST}", *sys.argv[1:]]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if not sys.argv[1:]:
        PAGE.write_text(page(lines, tests.returncode), encoding="utf-8")
        print(f"recorded in {PAGE.relative_to(ROOT)}")
    return tests.returncode


def page(lines: list[str], status: int) -> str:
    """The record. `lines` is pytest's output; its last line of `=` is the summary."""
    summaries = [line.strip("= ") for line in lines if re.fullmatch(r"=+ .* in [\d.]+s.* =+", line)]
    summary = summaries[-1] if summaries else f"pytest ended with {status} and no summary"
    slow = [match.groups() for line in lines if (match := re.fullmatch(r"([\d.]+s) +(?:call|setup) +(\S+)", line))]
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    rows = "\n".join(f"| {seconds} | `{name}` |" for seconds, name in slow)
    trouble = "\n".join(f"    {line}" for line in failed)
    return (
        "# The last `make test-all`\n\n"
        "Written by `scripts/test_all.py`; do not edit.\n\n"
        "| | |\n|---|---|\n"
        f"| when | {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, at commit {commit()} |\n"
        f"| where | {os.cpu_count()} cores of {processor()}, Linux {platform.machine()} |\n"
        f"| with | Python {platform.python_version()}, jax {version('jax')} |\n"
        f"| result | **{summary}** |\n"
        + (f"\n{trouble}\n" if failed else "")
        + f"\nThe slowest:\n\n| seconds | test |\n|---|---|\n{rows}\n"
    )


def commit() -> str:
    """The commit under test, "+" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name as Linux has it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else "an unnamed processor"


if __name__ == "__main__":
    sys.exit(main())
