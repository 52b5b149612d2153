"""What this machine has free for a job, asked without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil

SHARE_OF_FREE = 0.85
"""Part of the free memory that is taken where no budget is given; other programs keep the rest."""


def host_budget() -> int:
    """Bytes of RAM for a job."""
    available = psutil.virtual_memory().available
    try:  # a container may be allowed less than the machine has
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, max(0, allowed - used))
    except (OSError, ValueError):
        pass  # no such group, or "max": no limit
    return int(available * SHARE_OF_FREE)


def disk_budget(directory: Path | None) -> int:
    """Free bytes of the disk of the offload directory, which may not exist yet."""
    wanted = (directory or Path(tempfile.gettempdir())).absolute()
    existing = next(path for path in (wanted, *wanted.parents) if path.exists())
    return shutil.disk_usage(existing).free


def gpu_budget() -> int | None:
    """Bytes of the first visible GPU's memory for a job; None where there is no NVIDIA GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible is not None:
        first = visible.split(",")[0].strip()
        if first in ("", "-1"):
            return None
        command += ["--id", first]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(int(done.stdout.split()[0]) * 2**20 * SHARE_OF_FREE)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # no driver, no GPU, or one whose memory is not its own
