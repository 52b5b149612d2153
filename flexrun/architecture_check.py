"""Is this architecture run exactly? A random twin of the model answers, before any weight is read.

The twin has the model's kinds of layers and heads and is built from the config alone. It runs
through the real engine parts (packed ragged rows, paused forward passes, paged KV cache, weights on
three tiers) and through transformers' own forward pass. Verdicts are cached, so a new model family
either works or is refused, and is never silently wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig

import flexrun
from flexrun.errors import UnsupportedModelError, UsageError, not_exact
from flexrun.model import load_config, refuse_known
from flexrun.model_files import resolve_model
from flexrun.model_trace import trace
from flexrun.skeleton import one_line
from flexrun.twin import random_twin
from flexrun.twin_config import twin_config
from flexrun.twin_run import compare_with_twin
from policy_search.machine import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`exact`, `not exact` (detail says where) or `refused` (detail says why)."""

    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


def check_architecture(config: PretrainedConfig) -> Verdict:
    """Run the twin of `config` both ways and compare."""
    name = config.model_type
    try:
        refuse_known(config)
        trace(config, torch.float32)
    except UnsupportedModelError as error:
        return Verdict("refused", error.message)
    try:
        twin = random_twin(config, seed=0)
    except Exception as error:  # any failure of model code means that we cannot test it
        reason = f"no small model like it could be built to test it ({one_line(error)})"
        return Verdict("refused", not_exact(name, reason).message)
    try:
        with _one_thread():
            difference = compare_with_twin(twin)
    except UnsupportedModelError as error:
        return Verdict("refused", error.message)
    except Exception as error:  # model code again: refusing is right whatever went wrong in it
        logger.debug("the twin failed", exc_info=True)
        reason = f"a small model like it, built to test it, does not run ({one_line(error)})"
        return Verdict("refused", not_exact(name, reason).message)
    if difference is not None:
        return Verdict("not exact", difference)
    return Verdict("exact", f"a random {name} twin gives the logits of transformers' own forward")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Models as small as a twin run fastest so, by far if other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ensure_exact(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModelError` unless the architecture is run exactly; verdicts are cached."""
    refuse_known(config)
    verdict = cached_verdict(config)
    if verdict.status != "exact":
        hint = "`flexrun check --model M` repeats this check"
        if verdict.status == "refused":
            raise UnsupportedModelError(verdict.detail, hint)
        raise not_exact(config.model_type, verdict.detail, hint)


def cached_verdict(config: PretrainedConfig) -> Verdict:
    """The verdict for the architecture of `config`, computed the first time it is seen."""
    file = _verdict_file(config)
    try:
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    logger.info("checking the %s architecture once", config.model_type)
    verdict = check_architecture(config)
    if verdict.status == "refused":
        return verdict  # found out fast, and perhaps for want of memory or disk space
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(verdict)), encoding="utf-8")
        temporary.replace(file)
    return verdict


def _verdict_file(config: PretrainedConfig) -> Path:
    """One file per architecture (its twin's config) and versions of transformers and flexrun."""
    try:
        described: Any = twin_config(config).to_dict()
    except Exception:  # the check itself will say what is wrong with this config
        described = config.to_dict()
    text = json.dumps(described, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    versions = f"transformers-{transformers.__version__}-flexrun-{flexrun.__version__}"
    return cache_dir() / "verdicts" / versions / f"{config.model_type}-{digest}.json"


def main_check(model: str) -> int:
    """`flexrun check`: print the verdict; 0 exact, 1 not exact or refused, 2 wrong usage."""
    verdict = check_architecture(_config_of(model))
    print(f"{model}: {verdict}")
    return 0 if verdict.status == "exact" else 1


def _config_of(model: str) -> PretrainedConfig:
    path = Path(model)
    if path.suffix == ".gguf" or (not path.exists() and model.count("/") != 1):
        return load_config(resolve_model(model))
    if path.exists():
        return load_config(path)
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # a network's, or an architecture's own check of its settings
        raise UsageError(
            f"cannot get the config of {model}: {one_line(error)}",
            hint="give a local directory, a .gguf file, or a hub id that can be reached",
        ) from error
