"""Waits until the server at a URL answers, then prints where it is and a line to try. Ends with the server's process.

    python scripts/announce.py URL MODEL PID
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request

TEXT = """
  Serving at {url}  (a chat page for your browser)

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -H 'Authorization: Bearer EMPTY' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
"""
POLL_S = 0.3


def main() -> None:
    url, model, pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
    while is_alive(pid):
        if answers(url):
            print(TEXT.format(url=url, model=model), flush=True)
            return
        time.sleep(POLL_S)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def answers(url: str) -> bool:
    """Whether /health says 200; 503 is a server that still starts."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
