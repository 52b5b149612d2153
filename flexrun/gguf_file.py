"""Converts a GGUF file into a checkpoint directory, unpacking its weights to bfloat16."""

from __future__ import annotations

import importlib.util
import io
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from flexrun.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NEEDED = ("gguf", "accelerate")  # transformers reads GGUF files with the help of these two
_SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


def convert_gguf(path: Path, directory: Path) -> None:
    """Write the model and tokenizer in `path` to `directory` as transformers would save them.

    Raises `UsageError` for missing packages or a full disk, `CheckpointError` for a bad file.
    """
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"reading {path} needs the Python package {' and '.join(missing)}",
            hint=f"pip install {' '.join(missing)}",
        )
    with _quiet_transformers():
        try:
            model, tokenizer = _load(path)
        except CheckpointError:
            raise
        except Exception as error:  # neither gguf nor transformers promises an exception type
            raise CheckpointError(
                f"cannot read {path} as a GGUF model: {error}",
                hint="check that the file is whole and that transformers supports its "
                "architecture, or use the model's safetensors checkpoint",
            ) from error
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"cannot write {directory}: {error}",
                hint="free some disk space, or set FLEXRUN_CACHE to a directory that has more",
            ) from error


def _load(path: Path) -> tuple[Any, Any]:
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    if info["missing_keys"]:  # transformers would make up random values for them
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path} lacks {len(names)} of the model's tensors: {', '.join(names[:3])}",
            hint="a model split into several GGUF files must be merged first (llama-gguf-split)",
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for kind in _SPECIAL_TOKENS:
        # Some versions of transformers give the tokenizer its class's defaults instead.
        token_id = getattr(model.config, f"{kind}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
    return model, tokenizer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without notices of transformers, nor the progress bar that it lets nobody turn off."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
