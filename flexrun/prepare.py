"""`flexrun prepare`: writes the disk copy of a model's weights ahead of a job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from flexrun.architecture_check import ensure_exact
from flexrun.disk_weights import usable_in_place
from flexrun.errors import CapacityError
from flexrun.machine import offload_directory
from flexrun.model import build_model, load_config, stored_type
from flexrun.model_files import resolve_model
from flexrun.model_weights import find_weights
from offload.checkpoint import Checkpoint
from offload.prepared import find_prepared, model_key, prepare
from offload.prepared_layout import prepared_bytes
from offload.tiers import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexrun.config import EngineConfig
    from offload.slabs import Weight


def main_prepare(config: EngineConfig, *, copy: bool = False) -> int:
    """Prepare the model of `config` and print where its weights are; the exit code.

    With `copy`, also where the checkpoint could be read in place: jobs prefer the copy, which has
    checksums and may lie on a faster disk.

    Raises `FlexrunError`s.
    """
    checkpoint, units = _open(config)
    if not copy and usable_in_place(checkpoint, units) is not None:
        print(
            f"nothing to prepare: {checkpoint.directory} has the weights as they are used, "
            "so they are read from there"
        )
        return 0
    directory = offload_directory(config)
    key = model_key(checkpoint.fingerprint(), units)
    started = time.monotonic()
    store = find_prepared(directory, key)
    done = "already prepared"
    if store is None:
        _refuse_too_large(config, units)
        store = prepare(directory, key, checkpoint, units, checkpoint.check_unchanged)
        done = f"prepared in {time.monotonic() - started:.0f} s"
    print(f"{done}: {store.path} ({format_size(store.nbytes)})")
    store.close()
    return 0


def _open(config: EngineConfig) -> tuple[Checkpoint, list[list[Weight]]]:
    directory = resolve_model(config.model)
    hf_config = load_config(directory)
    ensure_exact(hf_config)  # no disk is filled for a model that will not be run
    stored = stored_type(directory, hf_config)
    dtype = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    model = build_model(hf_config, dtype, torch.device("cpu"))
    checkpoint = Checkpoint(directory, model.module, dtype, model.stored_dtypes)
    return checkpoint, find_weights(model, config.quantization, checkpoint.packed).units


def _refuse_too_large(config: EngineConfig, units: Sequence[Sequence[Weight]]) -> None:
    nbytes, limit = prepared_bytes(units), config.disk_space
    if limit is not None and nbytes > limit:
        raise CapacityError(
            f"the prepared weights need {format_size(nbytes)}, but {format_size(nbytes - limit)} "
            f"is missing in the budget of {format_size(limit)}",
            hint="raise --disk-space, or store fewer with --dtype bfloat16 or --weight-bits 4",
        )
