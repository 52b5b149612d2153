"""The link over which keys and values move between simulated machines (no torch)."""

from __future__ import annotations

from typing import NamedTuple


class Transfer(NamedTuple):
    """A request's keys and values on their way."""

    request: int
    asked: float
    """Seconds on the virtual clock: when they could have left, …"""
    start: float
    """… when they did, …"""
    end: float
    """… and when they were there."""
    nbytes: int


class Network:
    """One link that all machines share: a transfer waits for those that came before it."""

    def __init__(self, speed: float, token_bytes: int) -> None:
        """`speed` in bytes per second; `token_bytes` of keys and values of one token."""
        self.speed = speed
        self.token_bytes = token_bytes
        self.transfers: dict[int, Transfer] = {}
        """By request."""
        self._free_at = 0.0

    def send(self, now: float, request: int, tokens: int) -> Transfer:
        """Queue the keys and values of a request's first `tokens` positions."""
        nbytes = tokens * self.token_bytes
        start = max(now, self._free_at)
        self._free_at = start + nbytes / self.speed
        transfer = Transfer(request, now, start, self._free_at, nbytes)
        self.transfers[request] = transfer
        return transfer

    @property
    def seconds(self) -> float:
        """In which it was busy."""
        return self.nbytes / self.speed

    @property
    def nbytes(self) -> int:
        """That it moved."""
        return sum(transfer.nbytes for transfer in self.transfers.values())
