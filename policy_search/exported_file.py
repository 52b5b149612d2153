"""Files that a command was asked for: there whole or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from policy_search.errors import PolicyError
from policy_search.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def export_whole(path: Path, pieces: Iterable[str], flag: str) -> None:
    """Write text, or nothing. Raises `PolicyError`, naming `flag`."""
    try:
        write_whole(path, "".join(pieces))
    except OSError as error:
        raise _refusal(path, error, flag) from None


def check_file(path: Path, flag: str) -> None:
    """Raise `PolicyError` now, not after a long simulation, if `path` cannot be written."""
    if path.is_dir():
        raise PolicyError(f"{flag} {path} is a directory", hint="name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PolicyError(f"cannot write into {path.parent}", hint=f"choose another with {flag}")


def make_directory(path: Path, flag: str) -> None:
    """Make `path`, unless it is there. Raises `PolicyError` if it is something else."""
    if path.exists() and not path.is_dir():
        raise PolicyError(
            f"{flag} {path} is not a directory", hint="give one, or one that can be made"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(path, error, flag) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PolicyError(f"cannot write into {path}", hint=f"choose another with {flag}")


def _refusal(path: Path, error: OSError, flag: str) -> PolicyError:
    return PolicyError(
        f"cannot write {path}: {error.strerror or error}", hint=f"choose another with {flag}"
    )
