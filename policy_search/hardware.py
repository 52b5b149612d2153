"""What a machine can do, in bytes per second: measured, or stated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Speeds that the cost model asks for."""

    host_to_device: float
    """Of copies from pinned RAM to the device."""
    host_attention: float
    """Bytes of keys and values in RAM that the processor attends to, a row for each sequence."""
