"""Finds the checkpoint directory of a model given as a directory, GGUF file or hub name."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flexrun.errors import UsageError
from policy_search.machine import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",  # not the second copy of the weights that some models have beside them
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
)
_CONVERSION = "1"
"""Part of a converted model's key: raise it when the conversion changes."""
_MIB = 2**20


def resolve_model(model: str | Path) -> Path:
    """The checkpoint directory of `model`: a directory, a .gguf file, or a hub name (org/name).

    Converts a GGUF file once and downloads from the hub what is not there yet.
    Raises `UsageError`; `CheckpointError` for a GGUF file that cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked_directory(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(
                f"{path} is a file, but not a .gguf file",
                hint="give the directory that has the model's config.json and *.safetensors",
            )
        return _converted(path)
    if _HUB_NAME.fullmatch(str(model)):
        return _checked_directory(_downloaded(str(model)))
    raise UsageError(
        f"there is no model at {model}",
        hint="give a checkpoint directory, a .gguf file, or a model of the Hugging Face Hub "
        "as org/name",
    )


def _checked_directory(path: Path) -> Path:
    config = path / "config.json"
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        inside = sorted(file.name for file in path.glob("*.gguf"))
        raise UsageError(
            f"{path} has no config.json, so it is not a checkpoint directory",
            hint=f"give the GGUF file itself: {path / inside[0]}"
            if inside
            else "give the directory that has the model's config.json and *.safetensors",
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {config}: {error}", hint="download or copy the file again"
        ) from error
    return path


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download  # a second to import, seldom needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # whatever its network library raises
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"there is no directory {name}, and downloading {name} from the Hugging Face Hub "
            f"failed: {type(error).__name__}: {reason}",
            hint="check the name and the network (HF_HUB_OFFLINE=1 allows downloaded models only); "
            "for a gated model accept its terms and run: hf auth login",
        ) from error


def _converted(path: Path) -> Path:
    try:
        models = cache_dir() / "models"
        models.mkdir(parents=True, exist_ok=True)
        target = models / f"{path.stem}-{_fingerprint(path)}"
        if not target.exists():
            with _locked(target.with_name(f"{target.name}.lock")):
                if not target.exists():  # nobody converted it while we waited
                    _convert_into(target, path)
    except OSError as error:
        raise UsageError(
            f"cannot convert {path} into the cache {cache_dir()}: {error}",
            hint="set FLEXRUN_CACHE to a directory that you can write to",
        ) from error
    return target


def _convert_into(target: Path, path: Path) -> None:
    from flexrun.gguf_file import convert_gguf  # imports torch and transformers

    prefix = f".{target.name}-"
    for stale in target.parent.glob(f"{prefix}*"):  # under the lock: its process was killed
        shutil.rmtree(stale, ignore_errors=True)
    logger.info("converting %s to %s (once)", path, target)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as temporary:
        unfinished = Path(temporary, "model")
        convert_gguf(path, unfinished)
        for file in unfinished.iterdir():
            _flush(file)  # or a power cut could leave the new name on empty files
        unfinished.rename(target)


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _fingerprint(path: Path) -> str:
    """Changes with the file's content, without reading gigabytes."""
    status = path.stat()
    digest = hashlib.sha256(f"{_CONVERSION} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_MIB))
        file.seek(max(0, status.st_size - _MIB))
        digest.update(file.read(_MIB))
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file lock `path`; the system frees it even if this process is killed."""
    import fcntl  # not on Windows, which only GGUF files would notice

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
