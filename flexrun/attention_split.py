"""Which pages on HOST the processor attends to, and which move to the device for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexrun.host_attention import HostAttention
from offload.links import Link
from offload.raw_speed import raw_speeds
from offload.tiers import Tier
from policy_search.cost_model import SweepWork, best_host_share
from policy_search.hardware import Hardware
from policy_search.kv_memory import broken_off_bytes, hosted_row_bytes, hosted_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexrun.attention_speed import AttentionSpeed
    from flexrun.model_trace import AttentionShape
    from flexrun.scheduler import BatchScheduler
    from offload.backend import DeviceBackend
    from offload.kv_cache import KVCache
    from offload.transfer_engine import TransferEngine
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy


class AttentionSplit:
    """As the policy says, or so that link and processor take as long in every sweep."""

    def __init__(
        self,
        policy: Policy,
        shape: ModelShape,
        layer: AttentionShape,
        kv_cache: KVCache,
        scheduler: BatchScheduler,
        backend: DeviceBackend,
        transfers: TransferEngine,
    ) -> None:
        """`layer` stands for all of them when the processor's speed is measured."""
        self.host: HostAttention | None = None
        """None where no row attends on HOST."""
        self._layer = layer
        self._kv = kv_cache
        self._scheduler = scheduler
        self._backend = backend
        self._streamed_bytes = 0
        self.hardware: Hardware | None = None
        """What was measured."""
        most_rows = hosted_rows(policy, unified=backend.unified)
        if not most_rows or not scheduler.pools.capacity.get(Tier.HOST):
            return
        from flexrun.attention.cpu import CpuAttention  # Numba takes a while to import

        # An emulated device computes on the same cores.
        threads = torch.get_num_threads() // (2 if backend.device.type == "cpu" else 1)
        memory = most_rows, hosted_row_bytes(shape), broken_off_bytes(shape, policy)
        attention = CpuAttention(max(1, threads))
        attention.compile(kv_cache.format)
        self.host = HostAttention(attention, kv_cache, backend, transfers, *memory)
        scheduler.speculation.spares_host = True
        self._always = policy.attention == "host"
        if self._always:
            kv_cache.attend_on_host(lambda _: 1.0)
            scheduler.cutter.rows_stay_on_host = True

    def measure(self, link: float | None, streamed_bytes: int) -> None:
        """Before the first sweep: what the split depends on.

        `link`: bytes per second of the link from HOST, if that is known; `streamed_bytes` of
        weights cross it in every sweep.
        """
        if self.host is None or self._always:
            return
        if link is None:
            link = raw_speeds(self._backend, self._kv.raw_copies())[Link.HOST_TO_DEVICE]
        speed = self.measured_speed().bytes_per_second
        self.hardware = Hardware(host_to_device=link, host_attention=speed)
        self._streamed_bytes = streamed_bytes
        self._scheduler.cutter.rows_stay_on_host = speed >= link
        self._kv.attend_on_host(self._best_share)

    def measured_speed(self, compute: Callable[[], object] | None = None) -> AttentionSpeed:
        """Of the processor's attention, also beside `compute`; only where rows attend on HOST."""
        assert self.host is not None
        return self.host.measure(self._layer, compute)

    def _best_share(self, kv_bytes: int) -> float:
        assert self.hardware is not None
        work = SweepWork(weights=self._streamed_bytes, host_kv=kv_bytes)
        return best_host_share(work, self.hardware)

    def close(self) -> None:
        """Give memory and threads back."""
        if self.host is not None:
            self.host.close()
