"""Tiers, splits over tiers, sizes, and the account that holds every budget (no torch)."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from offload.errors import CapacityError, SplitError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Tier(str, Enum):
    """Where bytes live, fastest first."""

    DEVICE = "device"
    """Memory of the compute device (RAM when the CPU computes)."""
    HOST = "host"
    """RAM of the machine, pinned where a GPU reads it."""
    DISK = "disk"
    """A file in the offload directory."""

    __str__ = str.__str__


CACHE_LINE = 64
"""Tensors start on cache lines inside a slab."""
DISK_BLOCK = 4096
"""Direct I/O moves whole blocks of the disk to and from addresses that are multiples of this."""
REQUEST_BYTES = 4 * 2**20
"""Of one disk request or one copy of a large piece: some 0.3 ms on a fast link."""
STAGING_BUFFERS = 8
"""Buffers of at most one request each that bytes pass through from disk to a separate device."""
TURNS = 2
"""Micro-batches whose KV pages are in staging: the one that computes, and the next."""
BROKEN_OFF = 2
"""Micro-batches that wait inside a layer for attention on HOST while another one computes: HOST
attends to one of them and has the next one's queries when it is done. With one, it would wait for
these each time that the device takes about as long as HOST."""
HOSTED_TURNS = BROKEN_OFF + 1
"""Micro-batches whose rows attend on HOST."""
LEAVING_BATCHES = 6
"""Micro-batches whose new keys and values of one layer may be on their way from device to HOST: so
many that neither has to wait for the other where the link and compute take the same time."""
PACKED_PAGES = 64
"""Full pages of one layer that are packed into few bits at a time."""


def padded(nbytes: int, unit: int) -> int:
    """`nbytes` rounded up to a whole number of `unit`s."""
    return -(-nbytes // unit) * unit


def staging_buffer_bytes(largest_slab: int) -> int:
    """Bytes of one staging buffer where the largest piece to read from disk is `largest_slab`."""
    return min(REQUEST_BYTES, padded(largest_slab, DISK_BLOCK))


BUDGET_FLAG = {
    Tier.DEVICE: "--device-memory",
    Tier.HOST: "--host-memory",
    Tier.DISK: "--disk-space",
}


@dataclass(frozen=True, slots=True)
class Split:
    """Percent of the bytes of something on each tier; the three sum to 100."""

    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.device, self.host, self.disk)
        if not all(0 <= part <= 100 for part in parts):  # also refuses NaN
            raise SplitError(f"split {self}: every part must be between 0 and 100")
        if abs(sum(parts) - 100) > 1e-6:
            raise SplitError(
                f"split {self} sums to {sum(parts):g}, not 100",
                hint="write all parts, for example device=20,host=80",
            )

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read `device=20,host=80`; tiers that are not named get 0. Raises `SplitError`."""
        parts: dict[str, float] = {}
        for item in text.split(","):
            name, equals, value = item.strip().partition("=")
            if name not in tuple(Tier) or not equals or name in parts:
                raise SplitError(
                    f"cannot read {item!r} in the split {text!r}",
                    hint="a split looks like device=20,host=30,disk=50",
                )
            try:
                parts[name] = float(value)
            except ValueError:
                raise SplitError(f"{value!r} in the split {text!r} is not a number") from None
        return cls(**parts)

    def fraction(self, tier: Tier) -> float:
        """Share of `tier`, 0 to 1."""
        percent: float = getattr(self, tier.value)
        return percent / 100

    def __str__(self) -> str:
        return ",".join(f"{tier}={getattr(self, tier.value):g}" for tier in Tier)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMgGtT]?)(i?)[bB]?\s*\Z")


def parse_size(text: str) -> int:
    """Bytes of `16GiB` (binary), `16GB` or `16G` (decimal), or `1048576`. Raises `SplitError`."""
    match = _SIZE.match(text)
    if match is None or (match[3] and not match[2]):
        raise SplitError(f"cannot read the size {text!r}", hint="a size looks like 16GiB or 500MB")
    unit = match[2].upper()
    factor = 1024 ** "KMGT".index(unit) * 1024 if match[3] else _UNITS[unit]
    return int(float(match[1]) * factor)


def format_size(nbytes: float) -> str:
    """`nbytes` for a person: `1.50 GiB`."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


@dataclass(slots=True)
class MemoryAccount:
    """Bytes in use, peak and limit per tier; nothing is allocated without a charge here."""

    limits: Mapping[Tier, int | None] = field(default_factory=dict)
    used: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    peak: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def available(self, tier: Tier) -> int | None:
        """Bytes left under the limit of `tier`; None without a limit."""
        limit = self.limits.get(tier)
        return None if limit is None else limit - self.used[tier]

    def charge(self, tier: Tier, nbytes: int, what: str) -> None:
        """Take `nbytes` for `what`. Raises `CapacityError` naming what is missing and the flag."""
        with self._lock:
            limit = self.limits.get(tier)
            if limit is not None and self.used[tier] + nbytes > limit:
                missing = self.used[tier] + nbytes - limit
                raise CapacityError(
                    f"{what} needs {format_size(nbytes)} on {tier}, but {format_size(missing)} is "
                    f"missing ({format_size(self.used[tier])} of {format_size(limit)} in use)",
                    hint=f"raise {BUDGET_FLAG[tier]}, put a smaller share on {tier} (--weights, "
                    "--kv-cache), or lower --max-sequences, --max-rows or --micro-batch",
                )
            self.used[tier] += nbytes
            self.peak[tier] = max(self.peak[tier], self.used[tier])

    def refund(self, tier: Tier, nbytes: int) -> None:
        """Give back `nbytes` that were charged."""
        with self._lock:
            self.used[tier] -= nbytes
