"""What long work reports belongs to the phase that holds when it is reported, not when the work was begun."""

import jaxserve.progress
from jaxserve.progress import ConsoleProgress


def test_a_task_reports_in_the_phase_that_holds(monkeypatch):
    monkeypatch.setattr(jaxserve.progress, "LOG_EVERY_S", 0.0)
    heard: list[tuple[str, str]] = []
    progress = ConsoleProgress(on_phase=lambda name, detail: heard.append((name, detail)))
    progress.phase("compiling")
    with progress.task("programs", 3, "programs") as advance:
        advance()
        progress.phase("serving")
        advance(2)
    assert heard == [
        ("compiling", ""),
        ("compiling", "programs: 1 programs of 3 programs"),
        ("serving", ""),
        ("serving", "programs: 3 programs of 3 programs"),
    ]


def test_bytes_are_told_in_gigabytes(monkeypatch):
    monkeypatch.setattr(jaxserve.progress, "LOG_EVERY_S", 0.0)
    heard: list[str] = []
    progress = ConsoleProgress(on_phase=lambda name, detail: heard.append(detail))
    with progress.task("weights", 2 * 10**9, "B") as advance:
        advance(10**9)
    assert heard == ["weights: 1.00 GB of 2.00 GB"]
