"""What an engine is built from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from policy_search.bits import CHOSEN
from policy_search.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

    from compression.selection import Quantization
    from offload.tiers import Split
    from policy_search.workload import JobLengths

DEVICES = ("auto", "cuda", "cpu", "emulated")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Model, device, budgets and policy of an engine."""

    model: str
    """Directory, hub id or `.gguf` file."""
    device: str = "auto"
    """One of `DEVICES`; auto takes CUDA where there is a GPU."""
    dtype: str = "auto"
    """One of `DTYPES`; auto is the checkpoint's own, unless the device computes it too slowly."""
    policy: Policy | None = None
    """None: placed automatically under the budgets."""
    weights: Split | None = None
    """Overrides the policy's field; so do the next sixteen."""
    kv_cache: Split | None = None
    activations: Split | None = None
    micro_batch_rows: int | None = None
    num_micro_batches: int | None = None
    max_rows: int | None = None
    max_sequences: int | None = None
    attention: str | None = None
    scheduler: str | None = None
    order: str | None = None
    speculation: str | None = None
    preemption: str | None = None
    weight_bits: int | None = None
    head_bits: int | None = None
    kv_bits: int | None = None
    group_size: int | None = None
    keep: str | None = None
    allow_quantization: bool = False
    """The planner may choose `weight_bits` and `kv_bits` where they are None."""
    job_lengths: JobLengths | None = None
    """The job that it chooses them for; None: 2 048 conversations."""
    overlap: bool = True
    device_memory: int | None = None
    """Budget in bytes; None: what the device has free. The next two likewise."""
    host_memory: int | None = None
    disk_space: int | None = None
    offload_dir: Path | None = None
    """Directory of the DISK tier; None: `$FLEXRUN_OFFLOAD_DIR`,
    or the user's cache."""
    trace: Path | None = None
    """File that gets a Chrome trace of the run; None: no trace."""
    emulate: str | None = None
    """The emulated machine, for example `capacity=256MiB,host-to-device=2GB/s`."""
    seed: int = 0
    """Random state that requests without a seed of their own derive theirs from."""

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields of the policy that are given."""
        return {f: value for f in OVERRIDES if (value := getattr(self, f)) is not None}

    @property
    def quantization(self) -> Quantization:
        """What is quantized, as far as it is given."""
        return replace(self.policy or Policy(), **self.overrides).quantization

    def with_policy(self, policy: Policy) -> EngineConfig:
        """With all of `policy`, and nothing left to be chosen."""
        settled: dict[str, Any] = dict.fromkeys(OVERRIDES)
        return replace(self, policy=policy, allow_quantization=False, **settled)

    @property
    def free_bits(self) -> tuple[str, ...]:
        """Fields that the planner may choose."""
        return tuple(f for f in CHOSEN if self.allow_quantization and getattr(self, f) is None)


OVERRIDES = tuple(
    field.name
    for field in fields(EngineConfig)
    if field.name in {each.name for each in fields(Policy)} - {"overlap"}
)
"""Settings that replace single fields of the policy."""
