"""What this machine has free for a job, asked without importing torch."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from offload.prepared_layout import unfinished_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARE_OF_FREE = 0.85
"""Part of the free memory that is taken where no budget is given; other programs keep the rest."""


_BFLOAT16_FLAGS = {"avx512_bf16", "avx_ne_convert", "bf16", "amx_bf16"}
"""Of x86 and Arm processors that multiply bfloat16. With AVX-512 alone, products of more than a few
rows take twice as long as in float32."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has fast bfloat16 products; assumed where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return True
    lines = text.splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    return flags is None or not _BFLOAT16_FLAGS.isdisjoint(flags.split())


def computed_on_cpu(stored: str) -> str:
    """The type in which a CPU computes weights of type `stored`."""
    slow = stored == "float16" or (stored == "bfloat16" and not multiplies_bfloat16())
    return "float32" if slow else stored


def host_budget() -> int:
    """Bytes of RAM for a job."""
    available = min([psutil.virtual_memory().available, *_left_in_groups()])
    return int(available * SHARE_OF_FREE)


def _left_in_groups() -> Iterator[int]:
    """Bytes left under each limit of the control groups that this process is in."""
    for directory, limit, usage in _memory_groups():
        try:  # a container may be allowed less than the machine has
            allowed = int((directory / limit).read_text())
            yield max(0, allowed - int((directory / usage).read_text()) + _cache(directory))
        except (OSError, ValueError):
            continue  # no such group, or "max": no limit


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    """Directories of this process's groups and their parents, with the names of two files."""
    root = Path("/sys/fs/cgroup")
    yield root, "memory.max", "memory.current"  # where a container sees only its own group
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base = root / "memory" if controllers else root
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            names = names if controllers else ("memory.max", "memory.current")
            group = base / path.lstrip("/")
            for directory in (group, *group.parents):
                yield directory, *names
                if directory == base:
                    break


def _cache(directory: Path) -> int:
    """Bytes of files that the group's memory holds, which the system gives up when needed."""
    text = (directory / "memory.stat").read_text()
    values = dict(line.split() for line in text.splitlines())
    names = ("total_inactive_file", "total_active_file", "inactive_file", "active_file")
    return sum(int(values.get(name, 0)) for name in names[:2]) or sum(
        int(values.get(name, 0)) for name in names[2:]
    )


def cache_dir() -> Path:
    """Where what is made once is kept: `$FLEXRUN_CACHE`, or flexrun in the user's cache."""
    if own := os.environ.get("FLEXRUN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexrun"


def offload_dir(given: Path | None) -> Path:
    """Where weights are kept on disk: as given, or `$FLEXRUN_OFFLOAD_DIR`, or the user's cache."""
    own = os.environ.get("FLEXRUN_OFFLOAD_DIR")
    chosen = given or (Path(own).expanduser() if own else cache_dir())
    return chosen.absolute()


def disk_budget(directory: Path | None) -> int:
    """Free bytes of the disk of the offload directory, which may not exist yet.

    With those of a store that was begun there: it is continued, or removed for another one.
    """
    wanted = offload_dir(directory)
    existing = next(path for path in (wanted, *wanted.parents) if path.exists())
    return shutil.disk_usage(existing).free + unfinished_bytes(wanted)


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
