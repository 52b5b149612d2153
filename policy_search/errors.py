"""What can go wrong while planning."""

from __future__ import annotations

from compression.errors import FlexrunError


class PolicyError(FlexrunError, ValueError):
    """A policy is contradictory, cannot be read, or does not fit the machine."""
