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
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def run_benchmarks(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Speed in memory, raw links, and jobs whose weights come from pinned RAM and from disk."""
    demo = run([sys.executable, "scripts/get_demo_model.py"], stdout=subprocess.PIPE)
    yield "demo model", {"exit_code": demo.returncode}
    if demo.returncode == 0:
        model = demo.stdout.strip().splitlines()[-1]
        in_memory = ["scripts/bench_inmemory.py", "--model", model, *ON_GPU, "--quick"]
        yield "in memory", run_report(in_memory)
    yield "links", run_report(["scripts/bench_links.py", *ON_GPU])
    model, prompts = str(directory / "1.1b"), directory / "prompts.jsonl"
    made = run([sys.executable, "scripts/make_random_model.py", "1.1b", model])
    yield "model for the jobs", {"exit_code": made.returncode}
    if made.returncode != 0:
        return
    lines = (
        json.dumps({"prompt_token_ids": [3 + (7 * i + k * k) % 30_000 for k in range(64 + i)]})
        for i in range(128)
    )
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = {
        "from RAM": ["--weights", "host=100", "--kv-cache", "device=100"],
        "from disk": ["--weights", "disk=100", "--kv-cache", "device=100"],
        "three links": ["--weights", "disk=100", "--kv-cache", "host=60,disk=40"],
    }
    base = ["-m", "flexrun", "generate", "--model", model, "--input", str(prompts), *ON_GPU]
    base += ["--max-tokens", "32", "--ignore-eos", "--dtype", "float32"]
    base += ["--offload-dir", str(directory)]
    for name, split in splits.items():
        tokens: list[list[Any]] = []
        for way, flags in (("", []), (", step by step", ["--no-overlap"])):
            output, trace = directory / f"{name}{way}.jsonl", directory / f"{name}{way}.json"
            files = ["--output", str(output), "--trace", str(trace)]
            report = run_report([*base, *split, *files, *flags])
            if report["exit_code"] == 0:
                tokens.append(tokens_of(output))
                report["longest_gap_ms"] = gaps(trace)
                # The same micro-batches, so the same numbers.
                report["exit_code"] = int(tokens[0] != tokens[-1])
            yield name + way, report


def tokens_of(output: Path) -> list[Any]:
    """The tokens of all results, in order of the input."""
    results = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return [each["token_ids"] for each in sorted(results, key=lambda each: each["index"])]


def gaps(trace: Path) -> dict[str, float]:
    """Of each row of a trace: the longest time between two intervals, in ms."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    longest: dict[str, float] = {}
    until: dict[str, float] = {}
    spans = [event for event in events if event["ph"] == "X"]
    for event in sorted(spans, key=lambda event: float(event["ts"])):
        row = str(names[event["pid"]])
        idle = event["ts"] - until.get(row, event["ts"])
        longest[row] = max(longest.get(row, 0.0), idle / 1000)
        until[row] = max(until.get(row, 0.0), event["ts"] + event["dur"])
    return longest


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
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = args.output_dir / f"gpu_check_{gpu}_{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    benchmarks: dict[str, dict[str, Any]] = {}
    tests: dict[str, Any] = {}
    result = {
        "command": "scripts/gpu_check.sh",
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "tests": tests,
        "benchmarks": benchmarks,
    }

    def save() -> None:  # after each part: whatever breaks later, its figures are there
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    tests |= run_tests()
    save()
    with tempfile.TemporaryDirectory(prefix="flexrun-gpu-check-") as directory:
        for name, report in run_benchmarks(Path(directory)):
            benchmarks[name] = report
            save()
    print(path)
    return int(any(part["exit_code"] != 0 for part in (tests, *benchmarks.values())))


if __name__ == "__main__":
    sys.exit(main())
