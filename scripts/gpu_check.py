"""Runs the GPU tests and a short benchmark, and writes what was found to one dated JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "scripts" / "bench_inmemory.py"


def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command, run at the root of the repository, which it can import from."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    print("+", *command, file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, **kwargs)


def describe_machine() -> dict[str, Any]:
    """The GPU, the processor and the versions that decide what the numbers mean."""
    gpu = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "gpu": gpu.name,
        "gpu_memory_bytes": gpu.total_memory,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": run(query, capture_output=True).stdout.strip(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def run_tests() -> dict[str, Any]:
    """pytest's counts over the tests marked gpu."""
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory, "junit.xml")
        arguments = ["-m", "pytest", "-m", "gpu", "--runslow"]
        done = run([sys.executable, *arguments, f"--junitxml={junit}"])
        summary: dict[str, Any] = {
            "command": " ".join(["python", *arguments]),
            "exit_code": done.returncode,
        }
        if junit.is_file():
            suite = next(ElementTree.parse(junit).iter("testsuite"))
            for count in ("tests", "failures", "errors", "skipped"):
                summary[count] = int(suite.attrib[count])
    return summary


def run_benchmark() -> dict[str, Any] | None:
    """The benchmark's report, which is its last line; None where there is no benchmark yet."""
    if not BENCHMARK.is_file():
        return None
    arguments = [str(BENCHMARK.relative_to(ROOT)), "--device", "cuda", "--quick"]
    done = run([sys.executable, *arguments], stdout=subprocess.PIPE)
    lines = done.stdout.strip().splitlines()
    report = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    command = " ".join(["python", *arguments])
    return {"command": command, "exit_code": done.returncode, "report": report}


def main() -> int:
    """Exit code 0 when everything passed, 1 when something failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "scripts" / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device, so there is nothing to check", file=sys.stderr)
        return 2
    now = datetime.now(timezone.utc)
    machine = describe_machine()
    tests, benchmark = run_tests(), run_benchmark()
    result = {
        "command": "scripts/gpu_check.sh",
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "tests": tests,
        "benchmark": benchmark,
    }
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = args.output_dir / f"gpu_check_{gpu}_{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path)
    failed = tests["exit_code"] != 0 or (benchmark is not None and benchmark["exit_code"] != 0)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
