"""What can go wrong with tiers, links and stored models."""

from __future__ import annotations

from compression.errors import FlexrunError


class CapacityError(FlexrunError):
    """A tier cannot hold what a policy puts there; the message names the missing bytes."""


class DeviceMemoryError(CapacityError):
    """The device ran out of memory in the middle of a sweep."""


class CheckpointError(FlexrunError):
    """A checkpoint is missing, truncated, corrupt, or does not fit the model's architecture."""


class OffloadStoreError(FlexrunError):
    """The offload directory cannot be written or read (disk full, permissions, I/O error)."""


class SplitError(FlexrunError, ValueError):
    """A split, size or link description on the command line cannot be parsed."""
