"""What rides in a sweep, and what that takes of every resource, in plain numbers (no torch)."""

from __future__ import annotations

from typing import NamedTuple

LINKS = ("disk->host", "host->device", "device->host", "host->disk", "disk->device")
"""As `offload.links.Link` calls them; the last one where the device computes in RAM."""
COMPUTE, HOST_ATTENTION = "compute", "host attention"
RESOURCES = (*LINKS, COMPUTE, HOST_ATTENTION)


class SweepLoad(NamedTuple):
    """A sweep's rows; all may be means."""

    rows: float
    """Token positions that are computed."""
    generating: float
    """Of them, newest tokens of sequences: a row each, which gives logits."""
    read: float
    """Stored positions that the generating rows attend to, in sum."""
    positions: float
    """Positions that all rows attend to, in sum, each row's counted."""
    stored: float
    """Positions of earlier sweeps that rows of prompts attend to, each sequence's counted once."""


class SweepTerms(NamedTuple):
    """A sweep's time."""

    seconds: float
    busy: dict[str, float]
    """Seconds in which each of `RESOURCES` works, as far as it does."""
