"""Writes docs/configuration.md from the table of flags; `tests/control/test_flags_reference.py` holds it current."""

from __future__ import annotations

from pathlib import Path

from jaxserve.flags.help import default_text, metavar
from jaxserve.flags.table import FLAGS, PARTS, Flag
from jaxserve.flags.unsupported import REASONS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

Written by `make docs` from `jaxserve/flags/table.py`; do not edit.

`jaxserve serve [MODEL] [--config FILE.yaml] [flags]`, and `LLM(MODEL, **flags)` with underscores for every part but
frontend. Flags beat the YAML file, the file beats the default.

| | |
|---|---|
| YAML | keys are the long names below, with dashes or underscores; a key given twice or unknown is an error |
| the file | looked up in the working folder, then among the shipped ones ([configs](../configs/)) |
| switches | `--flag`, `--no-flag`, `--flag=true`; in YAML `flag: false` |
| sizes | `k m g t` are powers of 1000, `K M G T` of 1024: `8k` is 8000, `8K` 8192 |
| several values | `--api-key A B` or the flag twice; a YAML list |
| JSON objects | `--hf-overrides '{"a": 1}'`, or one entry at a time: `--hf-overrides.a 1`; a YAML table |
| environment | `JAXSERVE_API_KEY`, where no `api-key` is given; the hub's own `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` |
| help | `--help`, `--help=GROUP`, `--help=FLAG`, `--help=all`; `--version` |
| exit status | 2 for anything wrong here, before anything is loaded |
"""

COLUMNS = "| flag | what | bounds | default |\n|---|---|---|---|"

REFUSED = """\
## Refused

vLLM has these; here each stops the start with the sentence beside it.

| flags | why |
|---|---|
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for part, about in PARTS.items():
        rows = "\n".join(row(flag) for flag in FLAGS if flag.part == part)
        sections.append(f"## {part}\n\n{about[0].upper()}{about[1:]}.\n\n{COLUMNS}\n{rows}\n")
    refused = "\n".join(f"| {' '.join(f'`{name}`' for name in names.split())} | {why} |" for names, why in REASONS)
    return "\n".join([*sections, f"{REFUSED}{refused}\n"])


def row(flag: Flag) -> str:
    """A line of a table."""
    short = f" `{flag.short}`" if flag.short else ""
    value = metavar(flag).strip().replace("|", " \\| ")
    held = default_text(flag)
    cells = (f"`--{flag.name}`{short} {value}".rstrip(), flag.help, bounds(flag), f"`{held}`" if held else "")
    return "|".join(["", *(f" {cell} " for cell in cells), ""])


def bounds(flag: Flag) -> str:
    """As a reader wants them: an upper bound that only keeps numbers within their type is none."""
    if flag.low is None or flag.high is None:
        return ""
    return f"{flag.low} to {flag.high}" if flag.high < 2**31 - 1 else f"at least {flag.low}"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
