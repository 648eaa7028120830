"""Writes constraints.txt: the exact versions in the given environments, with markers where they differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OURS = {"jaxserve"}


def frozen(venv: Path) -> tuple[str, dict[str, str]]:
    """The environment's Python version and its packages."""
    python = venv / "bin" / "python"
    version = subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True)
    lines = subprocess.check_output([python, "-m", "pip", "freeze", "--exclude-editable"], text=True).splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return version.strip(), {name.lower(): pin for name, pin in pairs if name.lower() not in OURS}


def main() -> None:
    environments = dict(frozen(Path(name)) for name in sys.argv[1:] if (Path(name) / "bin" / "python").exists())
    lines = ["# Written by `make lock`: the versions that the suite last passed with."]
    for name in sorted(set().union(*environments.values())):
        pins = {version: packages[name] for version, packages in environments.items() if name in packages}
        if len(set(pins.values())) == 1 and len(pins) == len(environments):
            lines.append(f"{name}=={next(iter(pins.values()))}")
        else:
            lines += [f"{name}=={pin}; python_version == '{version}'" for version, pin in sorted(pins.items())]
    Path("constraints.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
