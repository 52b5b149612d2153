"""Runs large language models over big batches of prompts on machines too small for them.

    from flexrun import LLM, SamplingParams

    with LLM("path/to/model", weights="device=20,host=80") as llm:
        outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))

Names are imported on first use, so that `import flexrun` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexrun.errors import (
        CapacityError,
        CheckpointError,
        FlexrunError,
        OffloadStoreError,
        PolicyError,
        RequestError,
        SplitError,
        UnsupportedModelError,
        UsageError,
    )
    from flexrun.llm import LLM
    from flexrun.request import CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "FlexrunError",
    "OffloadStoreError",
    "PolicyError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SplitError",
    "UnsupportedModelError",
    "UsageError",
]

_HOME = {
    "LLM": "flexrun.llm",
    "CompletionOutput": "flexrun.request",
    "RequestOutput": "flexrun.request",
    "SamplingParams": "flexrun.request",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flexrun' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "flexrun.errors")), name)
