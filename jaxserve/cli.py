"""The installed command: `jaxserve serve MODEL ...`, `jaxserve plan ...`. Dispatches and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = """\
usage: jaxserve serve [MODEL] [flags]   serve a model through the OpenAI API (jaxserve serve --help)
       jaxserve plan [MODEL] ...        what a model takes on devices that need not be here (jaxserve plan --help)
       jaxserve --version               print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["serve"]:
        from jaxserve.serve import main as serve

        return serve(words[1:])
    if words[:1] == ["plan"]:
        from jaxserve.plan.__main__ import main as plan

        return plan(words[1:])
    if words in (["--version"], ["-v"]):
        from jaxserve import __version__

        print(__version__)
        return 0
    asks = not words or words in (["--help"], ["-h"])
    if not asks:
        print(f"jaxserve: error: unknown verb {words[0]!r}; there are 'serve' and 'plan'", file=sys.stderr)
    print(_USAGE, end="", file=sys.stdout if asks else sys.stderr)
    return 0 if asks else 2


if __name__ == "__main__":
    sys.exit(main())
