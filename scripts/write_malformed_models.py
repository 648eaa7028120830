"""Writes docs/malformed-models.md: what the server says of each folder in tests/device/malformed_folders.py.

`tests/device/test_malformed_folders.py` holds the page current.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from jaxserve.core.errors import JaxserveError
from tests.device.malformed_folders import ROWS, Row, make, start

PAGE = Path(__file__).parents[1] / "docs" / "malformed-models.md"
MESSAGE_CHARS_MAX = 260

HEAD = """\
# Malformed model folders

Written by `make docs` from `tests/device/malformed_folders.py`; do not edit.

Each folder is a sound tiny one with one thing wrong. The start ends with the error beside it: nothing crashes, waits,
runs code that the folder brought, or takes memory beyond the size of its files. FOLDER stands for the path given.

What is *not* an error: without `generation_config.json` the defaults are OpenAI's; a tokenizer may know fewer tokens
than the embedding has rows; added tokens beyond it are warned of, and a prompt that uses one is refused.

| what is wrong | what is said |
|---|---|
"""


def said(row: Row, parent: Path) -> str:
    """The error of one folder, without what differs between machines."""
    folder = make(parent / "model", row)
    try:
        start(folder)
    except JaxserveError as error:
        message = " ".join(str(error).replace(str(folder), "FOLDER").split())
        return f"{type(error).__name__}: {message}"
    raise AssertionError(f"{row.name} was served")


def line(row: Row, message: str) -> str:
    """A row of the table, without the words of Python's JSON reader and the list of families, which change."""
    text = re.sub(r"(is not JSON|cannot be read|is not an index of weight files): .*", r"\1: …", message)
    text = re.sub(r"(is not supported; supported are) .*", r"\1 …", text)
    if len(text) > MESSAGE_CHARS_MAX:
        text = text[: MESSAGE_CHARS_MAX - 1] + "…"
    return f"| {row.name} | {text.replace('|', chr(92) + '|').replace('*', chr(92) + '*').replace('<', '&lt;')} |"


def page() -> str:
    """The whole page."""
    lines = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as parent:
            lines.append(line(row, said(row, Path(parent))))
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
