"""The README tells the truth: its commands run and the scripts it names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SCRIPTS = ("scripts/demo.sh", "scripts/test.sh")
TESTED_BLOCK = re.compile(r"^<!-- test -->\s*^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def bash(command: str, directory: Path, environment: dict[str, str]) -> None:
    """Runs a command as a reader of the README would, and shows its output if it fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n---\n{done.stdout}"


def test_readme_commands_run(tmp_path: Path, smollm2_dir: Path):
    """The bash blocks after `<!-- test -->` succeed, in order, in one directory, on $MODEL."""
    blocks = TESTED_BLOCK.findall(README.read_text(encoding="utf-8"))
    assert blocks, "no bash block of README.md is marked <!-- test -->"
    environment = {
        "OMP_NUM_THREADS": "1",  # another test has the other core
        "MODEL": str(smollm2_dir),
        "FLEXRUN_OFFLOAD_DIR": str(tmp_path / "offload"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for block in blocks:
        bash(block, tmp_path, environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_names_the_script(script: str):
    """The README names the demo and test scripts, and they are executable files."""
    assert script in README.read_text(encoding="utf-8")
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.slow
def test_demo_runs(tmp_path: Path):
    """The demo succeeds from any directory."""
    bash(str(ROOT / "scripts" / "demo.sh"), tmp_path, {})
