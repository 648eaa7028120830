#!/bin/sh
# Prints a Python to use: the version given, else 3.12 where one is found, else any python3 >= 3.11, else nothing.
# Debian's python3 may come without venv and ensurepip, which no environment can be made without.
try() { "$1" -c "import sys, venv, ensurepip; sys.exit(not ($2))" 2>/dev/null && { "$1" -c 'import sys; print(sys.executable)'; exit 0; }; }
find_version() {
  for place in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python "$HOME"/.local/share/uv/python/cpython-"$1"*/bin/python3; do
    try "$place" "sys.version_info[:2] == tuple(map(int, '$1'.split('.')))"
  done
}
if [ -n "$1" ]; then find_version "$1"; exit 0; fi
find_version 3.12
try python3 "sys.version_info >= (3, 11)"
for version in 3.13 3.11; do find_version "$version"; done
exit 0
