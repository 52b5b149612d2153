"""Prints the prompts of a job with their answers, then its report."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

WIDTH = 96


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def show(label: str, text: str) -> None:
    """One labelled text, wrapped, with its line breaks kept."""
    indent = " " * 9
    lines = [
        textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=indent)
        for line in text.strip().splitlines()
    ]
    print(f"{label:<9}" + "\n".join(lines).lstrip())


def asked(request: dict[str, Any]) -> str:
    """What the user wrote: the prompt, or the last message."""
    return request["prompt"] if "prompt" in request else request["messages"][-1]["content"]


def answers(result: dict[str, Any]) -> list[str]:
    """The texts of a result line, or why there is none."""
    if result.get("error"):
        return [f"(error: {result['error']['message']})"]
    return [completion["text"] for completion in result.get("completions", [result])]


def main(job: str, results: str, report: str) -> None:
    """Prints every prompt beside its answers, in the order of the job, then the report."""
    requests = read_lines(job)
    for result in sorted(read_lines(results), key=lambda result: result["index"]):
        show("prompt", asked(requests[result["index"]]))
        for text in answers(result):
            show("answer", text)
        print()
    print(Path(report).read_text(encoding="utf-8").strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
