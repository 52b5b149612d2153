"""Runs the GPU tests and short benchmarks, and writes what was found to one dated JSON file."""

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
ON_GPU = ["--device", "cuda"]


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


def run_report(arguments: list[str]) -> dict[str, Any]:
    """A command of this project whose last line on stdout is its report."""
    done = run([sys.executable, *arguments], stdout=subprocess.PIPE)
    lines = done.stdout.strip().splitlines()
    report = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    command = " ".join(["python", *arguments])
    return {"command": command, "exit_code": done.returncode, "report": report}


def run_benchmarks(directory: Path) -> dict[str, dict[str, Any]]:
    """Speed in memory, raw links, and a job whose weights come from pinned RAM, then from disk."""
    demo = run([sys.executable, "scripts/get_demo_model.py"], stdout=subprocess.PIPE)
    model = demo.stdout.strip().splitlines()[-1]
    random_model, prompts = directory / "1.1b", directory / "prompts.jsonl"
    run([sys.executable, "scripts/make_random_model.py", "1.1b", str(random_model)], check=True)
    lines = (
        json.dumps({"prompt_token_ids": [3 + (7 * i + k * k) % 30_000 for k in range(64 + i)]})
        for i in range(128)
    )
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reports = {
        "in memory": run_report(
            ["scripts/bench_inmemory.py", "--model", model, *ON_GPU, "--quick"]
        ),
        "links": run_report(["scripts/bench_links.py", *ON_GPU]),
    }
    for name, weights in (("from RAM", "host=100"), ("from disk", "disk=100")):
        job = ["-m", "flexrun", "generate", "--model", str(random_model), "--input", str(prompts)]
        job += ["--output", str(directory / f"{weights}.jsonl"), "--max-tokens", "32"]
        job += ["--weights", weights, "--kv-cache", "device=100", "--ignore-eos", *ON_GPU]
        job += ["--offload-dir", str(directory)]
        reports[name] = run_report(job)
    return reports


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
    tests = run_tests()
    with tempfile.TemporaryDirectory(prefix="flexrun-gpu-check-") as directory:
        benchmarks = run_benchmarks(Path(directory))
    result = {
        "command": "scripts/gpu_check.sh",
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "tests": tests,
        "benchmarks": benchmarks,
    }
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = args.output_dir / f"gpu_check_{gpu}_{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path)
    return int(any(part["exit_code"] != 0 for part in (tests, *benchmarks.values())))


if __name__ == "__main__":
    sys.exit(main())
