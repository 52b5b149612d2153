"""Small text files that are written whole or not at all, whoever reads or writes them meanwhile."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by one rename; its directory is made. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be writing the same file.
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are its owner's alone
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Which can only be asked for by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def locked(path: Path, on_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it even if this process is killed.

    Its directory is made. `on_waiting` is called where another process holds it. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
