"""Compiled programs on disk, so that a second start neither traces nor compiles. Knows bytes and keys, no programs.

Loading an executable runs what is in it, hence the rules: the folder is the user's alone (0700, own uid, no link),
entries are the user's own regular files, and each opens with the SHA-256 of the rest. An entry that breaks a rule,
or is damaged, is a miss and is never loaded.
Invariant: `load` returns exactly bytes that an earlier `save` of the same key was given, or None.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

from jaxserve.core.errors import ConfigError

logger = logging.getLogger("jaxserve.compile")

MAGIC = b"jaxserve executable 1\n"
STORE_BYTES_MAX = 8 << 30       # beyond it the entries longest unused are removed


def default_folder() -> Path:
    """Where programs are kept when the user names no folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "xla"


def private_folder(path: Path) -> Path:
    """Makes `path` if need be and returns it; raises ConfigError unless it is this user's alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"compilation-cache-dir: cannot use {str(path)!r}: {error.strerror}; name a folder that you can write."
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"compilation-cache-dir: {str(path)!r} must be a folder of your own, and no link.")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


class ExecutableStore:
    """Bytes by key in one private folder. Holds no open file; safe from any thread and process."""

    def __init__(self, folder: Path, *, bytes_max: int = STORE_BYTES_MAX) -> None:
        self._folder = private_folder(folder)
        self._bytes_max = bytes_max

    def load(self, key: str) -> bytes | None:
        """The bytes saved under `key`, or None."""
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                logger.warning("compiled program %s is not a private file of this user: ignored", key[:12])
                return None
            content = file.read()
        start = len(MAGIC) + hashlib.sha256().digest_size
        payload = content[start:]
        if content[:start] != MAGIC + hashlib.sha256(payload).digest():
            logger.warning("compiled program %s is damaged on disk: compiled anew", key[:12])
            return None
        try:
            os.utime(self._path(key))
        except OSError:
            pass  # only the order of removal suffers
        return payload

    def save(self, key: str, payload: bytes) -> None:
        """Keeps `payload`; a disk that is full or read-only costs the next start time, not this one its life."""
        try:
            descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=".new-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
                os.replace(name, self._path(key))
            except BaseException:
                os.unlink(name)
                raise
            self._prune()
        except OSError as error:
            logger.warning("cannot keep a compiled program: %s", error.strerror)

    def discard(self, key: str) -> None:
        """Forgets `key`."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.exe"

    def _prune(self) -> None:
        found = []
        for path in self._folder.glob("*.exe"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process pruned it
            found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self._bytes_max
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
