"""Every exception flexrun raises on purpose, as one tree.

FlexrunError
├── UsageError               wrong arguments, files or settings; exit code 2
├── RequestError             one request cannot be served; the job goes on
├── UnsupportedModelError    the architecture cannot be run exactly
├── CheckpointError          missing, truncated, corrupt or foreign checkpoint
├── OffloadStoreError        the offload directory cannot be written or read
├── CapacityError            a tier cannot hold what the policy puts there
├── SplitError               a split or size cannot be parsed
└── PolicyError              a contradictory or unreadable policy
"""

from __future__ import annotations

from compression.errors import FlexrunError
from offload.errors import CapacityError, CheckpointError, OffloadStoreError, SplitError
from policy_search.errors import PolicyError

__all__ = [
    "CapacityError",
    "CheckpointError",
    "FlexrunError",
    "OffloadStoreError",
    "PolicyError",
    "RequestError",
    "SplitError",
    "UnsupportedModelError",
    "UsageError",
]


class UsageError(FlexrunError, ValueError):
    """Wrong arguments, files or settings: nothing was started."""


class RequestError(FlexrunError, ValueError):
    """One request cannot be served; `code` is the machine-readable reason."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.code = code


class UnsupportedModelError(FlexrunError):
    """The architecture cannot be run exactly; the message says which property is to blame."""


def not_exact(model_type: str, reason: str, hint: str | None = None) -> UnsupportedModelError:
    """The error of a model of this type."""
    return UnsupportedModelError(f"{model_type} models cannot be run exactly: {reason}", hint)
