"""Runs scripts: in the process of the tests, or in one that leaves the page cache as it is.

Most of a short run is the import of libraries. With the page cache emptied, tests beside this one
would read theirs again.
"""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

AS_A_USER = """
import os, runpy, sys

def refuse():
    raise PermissionError

os.sync = refuse
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Who may not empty the page cache fails at its first step."""


def run_as_a_user(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    path = os.pathsep.join([str(script.parent), str(script.parent.parent)])
    command = [sys.executable, "-c", AS_A_USER, str(script), *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def run_here(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a process of its own would have ended with."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(os, "sync", _refuse)
        patch.syspath_prepend(str(script.parent))
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
    if not isinstance(code, int):  # a message, which Python prints
        print(code, file=stderr)
        code = 1
    command = [str(script), *arguments]
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def _refuse() -> None:
    raise PermissionError
