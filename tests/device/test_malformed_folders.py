"""Malformed model folders: each is refused in a sentence, quickly, in little memory, and nothing of it is executed."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from jaxserve.core.errors import JaxserveError
from jaxserve.weights.folder import read_folder
from scripts.write_malformed_models import PAGE, line
from tests.device.malformed_folders import CANARY, ROWS, SINGLE, SOUND, Row, make, start

SECONDS_MAX = 10
BYTES_MAX = 50 << 20     # far above what the tiny model takes, far below what the folders pretend


def test_the_sound_folder_is_served(tmp_path: Path) -> None:
    start(make(tmp_path / "model", Row(name="sound", spoil=lambda _: None, says="")))
    assert len({row.name for row in ROWS}) == len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_malformed_folders_are_refused(tmp_path: Path, row: Row) -> None:
    folder = make(tmp_path / "model", row)
    tracemalloc.start()
    begin = time.monotonic()
    try:
        with pytest.raises(JaxserveError) as caught:
            start(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert row.says in str(caught.value)
    assert not (folder / CANARY).exists()
    assert time.monotonic() - begin < SECONDS_MAX
    assert peak < BYTES_MAX
    said = " ".join(str(caught.value).replace(str(folder), "FOLDER").split())
    page = PAGE.read_text(encoding="utf-8")
    assert line(row, f"{type(caught.value).__name__}: {said}") in page, "docs/malformed-models.md is old: make docs"


def test_the_page_has_no_other_rows() -> None:
    rows = [text for text in PAGE.read_text(encoding="utf-8").splitlines() if text.startswith("| ")]
    assert [text.split(" | ")[0].removeprefix("| ") for text in rows[1:]] == [row.name for row in ROWS]


def test_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", SINGLE):
        (blobs / name[::-1]).write_bytes((SOUND / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    assert read_folder(snapshot)
