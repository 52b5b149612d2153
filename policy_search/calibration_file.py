"""Where the measured speeds of machines are kept, and what tells one machine from another.

All without torch: plans that are made without it find what the engine's devices were measured to
do.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from compression.errors import FlexrunError
from offload.tiers import parse_size
from policy_search.errors import PolicyError
from policy_search.machine import cache_dir, offload_dir
from policy_search.machine_spec import MachineSpec
from policy_search.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = 2
"""Raise it when something else is measured: what was measured before is not used then."""
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineKey:
    """What speeds depend on, as far as it can be asked for: machines with the same are the same."""

    device: str
    """cuda, cpu or emulated."""
    dtype: str
    """That products are computed in: float32, bfloat16 or float16."""
    emulated: str
    """Settings of the emulated machine; empty for the others."""
    processor: str
    cores: int
    """That this process may run on; a core with two threads counts twice."""
    threads: int
    """That compute."""
    ram_gib: int
    gpu: str
    """Name and driver where a GPU computes, else empty."""
    disk: str
    """Of the offload directory."""

    @property
    def digest(self) -> str:
        """A name for files: 16 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine_key(
    device: str, dtype: str, directory: Path | None = None, emulate: str | None = None
) -> MachineKey:
    """This machine with one of its devices, `cuda`, `cpu` or `emulated`, computing in `dtype`.

    `directory`: the offload directory, which may not exist yet; None: the default one. `emulate`:
    settings of the emulated machine. Raises `SplitError` for what these settings do not allow.
    """
    return MachineKey(
        device=device,
        dtype=dtype,
        emulated=_settings(emulate or "") if device == "emulated" else "",
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=compute_threads(),
        ram_gib=round(psutil.virtual_memory().total / 2**30),
        gpu=_gpu() if device == "cuda" else "",
        disk=_disk(offload_dir(directory)),
    )


def _settings(text: str) -> str:
    """The same for the same machine: `host-to-device=2GB/s,capacity=1GiB` in bytes, in order."""
    items = (item.partition("=") for item in text.split(",") if item.strip())
    found = {name.strip(): parse_size(value.strip().removesuffix("/s")) for name, _, value in items}
    return ",".join(f"{name}={size}" for name, size in sorted(found.items()))


def processor_name() -> str:
    """The processor's name and numbers; its architecture where the system gives none."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="ignore").splitlines()
    except OSError:
        lines = []
    pairs = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
    # Virtual machines hide names, so numbers count, too; Arm's kernels give nothing else.
    x86 = ("model name", "cpu family", "model", "stepping")
    wanted = (*x86, "CPU implementer", "CPU part", "CPU variant")
    found = dict.fromkeys(pair for name in wanted for pair in pairs if pair[0] == name)
    return ", ".join(value for *_, value in found if value) or os.uname().machine


def compute_threads() -> int:
    """Threads that torch computes with, unless the program says otherwise.

    That is one on each core that the process may run on, or as many as the environment says, if
    these are fewer: see at::init_num_threads (aten/src/ATen/ParallelOpenMP.cpp), which takes what
    MKL finds.
    """
    cores = max(1, len(set(_physical_cores())))
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isdecimal() and int(first):
            return min(int(first), cores)
    return cores


def _physical_cores() -> Iterator[str]:
    """Of each logical one that the process may run on; the same for those that share a core."""
    for number in os.sched_getaffinity(0):
        file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            yield file.read_text().strip()
        except OSError:
            yield str(number)


def _gpu() -> str:
    """Name and driver of the first visible GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    command += ["--id", visible] if visible else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"GPU {visible}".strip()  # a part of one, or one that is asked in another way


def _disk(directory: Path) -> str:
    """Device, file system and mount point; numbers of devices change when a machine restarts."""
    existing = next(path for path in (directory, *directory.parents) if path.exists()).resolve()
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if existing.is_relative_to(mount.mountpoint)
    ]
    if not mounts:
        return f"device {existing.stat().st_dev}"
    # Of several on one another, the last is the one that is seen.
    found = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))
    return f"{found.device} ({found.fstype}) on {found.mountpoint}"


def calibration_path(key: MachineKey) -> Path:
    """The file for a machine, which may not exist."""
    return cache_dir() / "calibration" / f"{key.digest}.json"


def load_calibration(key: MachineKey) -> MachineSpec | None:
    """What was measured on this machine; None if nothing was, or other things than are now.

    Its memories are those that were free then. Raises `PolicyError` if the file is corrupt.
    """
    path = calibration_path(key)
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            return None
        machine = json.dumps(data["machine"])
        return MachineSpec.from_json(machine, str(path))
    except FileNotFoundError:
        return None
    except FlexrunError as error:
        raise _unreadable(path, error.message) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(path, f"{path} is no calibration: {error!r}") from None


def _unreadable(path: Path, message: str) -> PolicyError:
    return PolicyError(
        f"cannot use the measured speeds of this machine: {message}",
        hint=f"measure it again (`policy-search calibrate`), or delete {path}",
    )


def save_calibration(key: MachineKey, machine: MachineSpec) -> Path:
    """Keep what was measured in place of what was before. Raises `PolicyError`."""
    path = calibration_path(key)
    data = {"format": FORMAT, "key": asdict(key), "machine": json.loads(machine.to_json())}
    write_file(path, json.dumps(data, indent=2) + "\n", "set FLEXRUN_CACHE to another directory")
    return path


def write_file(path: Path, text: str, hint: str) -> None:
    """Raises `PolicyError` with `hint` where the file cannot be written."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise PolicyError(f"cannot write {path}: {error.strerror or error}", hint=hint) from None
