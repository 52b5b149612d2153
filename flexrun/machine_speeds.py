"""What the machine can do, measured before any weight is loaded: for plans that are compared."""

from __future__ import annotations

import contextlib
import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from flexrun.attention_speed import MEASURED_BYTES, measured_speed
from flexrun.calibration import measured_expansion, measured_flops, measured_reading
from offload.direct_file import DirectFile
from offload.links import FileExtent, Link
from offload.paged_kv import KVFormat, PagedKV
from offload.raw_speed import RawCopy, raw_speeds
from offload.safetensors_file import find_files
from offload.tiers import DISK_BLOCK, Tier
from policy_search.hardware import Hardware
from policy_search.sweep_cost import streamed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flexrun.model_plan import ModelPlan, ModelPlanner
    from policy_search.memory import TierMemory
    from policy_search.policy import Policy

_PIECES = 4
"""Buffers that are copied between."""
_MOST_READS = 64
"""Places of a file that are read."""


class MachineSpeeds:
    """Each speed is measured when the first plan needs it."""

    def __init__(self, planner: ModelPlanner) -> None:
        self._planner = planner
        self._backend = planner.backend
        self._known_products: tuple[float, float] | None = None
        self._expansion: dict[int, float] = {}
        self._attention: dict[int, float] = {}

    def of(self, plan: ModelPlan, memory: Mapping[Tier, TierMemory]) -> Hardware:
        """What `plan`, which takes `memory`, needs to know; the rest has no limit."""
        unified = self._backend.unified
        streamed, from_disk = streamed_bytes(plan.shape, plan.policy, unified=unified)
        on_host, on_disk = (memory[tier].kv for tier in (Tier.HOST, Tier.DISK))
        hosted = on_host and not unified and plan.policy.attention != "device"
        moves = not unified and (streamed or on_host or on_disk)
        flops, reading = self._products(plan)
        return Hardware(
            host_to_device=self._link if moves else math.inf,
            disk_read=self._disk if from_disk or on_disk else math.inf,
            host_attention=self._attention_on_host(plan.policy) if hosted else math.inf,
            expansion=self._expanded(plan),
            flops=flops,
            matrix_read=reading,
        )

    @cached_property
    def _link(self) -> float:
        """Of copies from HOST to DEVICE; no limit where there is no memory to copy between."""
        with self._buffers(Link.HOST_TO_DEVICE, Tier.HOST, Tier.DEVICE) as (sources, targets):
            pairs = enumerate(zip(sources, targets))
            copies = [RawCopy(source, target, n) for n, (source, target) in pairs]
            found = raw_speeds(self._backend, [(Link.HOST_TO_DEVICE, copies)])
        return found.get(Link.HOST_TO_DEVICE, math.inf)

    @cached_property
    def _disk(self) -> float:
        """Of reads of the checkpoint; the offload directory's disk is taken to be as fast.

        No limit where there is no memory to read into.
        """
        files = find_files(self._planner.checkpoint.directory)
        path = max(files, key=lambda each: each.stat().st_size)
        link = self._backend.disk_in
        tier = Tier.DEVICE if self._backend.unified else Tier.HOST
        with (
            contextlib.closing(DirectFile.open(path)) as file,
            self._buffers(link, tier) as (buffers,),
        ):
            if not buffers:
                return math.inf
            each, copies = buffers[0].nbytes, list[RawCopy]()
            for number, start in enumerate(range(0, file.size, each)[:_MOST_READS]):
                extent = FileExtent(file, start, min(each, file.size - start))
                buffer = number % len(buffers)
                copies.append(RawCopy(extent, buffers[buffer][: extent.nbytes], buffer))
            return raw_speeds(self._backend, [(link, copies)])[link]

    @contextlib.contextmanager
    def _buffers(self, link: Link, *tiers: Tier) -> Iterator[list[list[torch.Tensor]]]:
        """A few pieces of one request of `link` on each tier, as far as there is memory."""
        account, backend = self._backend.account, self._backend
        rooms = [account.available(tier) for tier in tiers]
        most = [room // 2 for room in rooms if room is not None]
        each = min([backend.request_bytes(link), *(room // _PIECES for room in most)])
        each = each // DISK_BLOCK * DISK_BLOCK
        if not each:
            yield [[] for _ in tiers]
            return
        with contextlib.ExitStack() as stack:
            pieces = []
            for tier in tiers:
                memory = backend.allocate(tier, _PIECES * each, "a test of the links")
                stack.callback(backend.free, tier, memory)
                pieces.append(list(memory.split(each)))
            yield pieces

    def _expanded(self, plan: ModelPlan) -> float:
        """Of weights as this plan stores them; no limit where they are computed with like that."""
        weight, bits = plan.weights.most_expanded, plan.policy.weight_bits
        if weight is None:
            return math.inf
        if bits not in self._expansion:
            self._expansion[bits] = measured_expansion(self._backend, weight, 0)
        return self._expansion[bits]

    def _products(self, plan: ModelPlan) -> tuple[float, float]:
        """Of many rows and of few, which are the same whatever the bits."""
        if self._known_products is None:
            device = self._backend, self._planner.dtype
            sizes = plan.shape.hidden_size, plan.shape.widest
            self._known_products = (
                measured_flops(*device, *sizes, 0),
                measured_reading(*device, plan.shape.hidden_size),
            )
        return self._known_products

    def _attention_on_host(self, policy: Policy) -> float:
        """Of the processor over pages like the ones that the policy stores."""
        if policy.kv_bits not in self._attention:
            self._attention[policy.kv_bits] = self._measured_attention(policy)
        return self._attention[policy.kv_bits]

    def _measured_attention(self, policy: Policy) -> float:
        from flexrun.attention.cpu import CpuAttention  # Numba takes a while to import

        planner, account = self._planner, self._backend.account
        name = str(planner.dtype).removeprefix("torch.")
        form = KVFormat(planner.dtype, policy.quantization.kv_groups(name))
        layer = planner.model.attention[0]
        page_bytes = form.page_bytes(layer, policy.page_tokens)
        room = account.available(Tier.HOST)
        nbytes = MEASURED_BYTES if room is None else min(MEASURED_BYTES, room // 2)
        nbytes = max(1, nbytes // page_bytes) * page_bytes
        # An emulated device computes on the same cores.
        threads = torch.get_num_threads() // (2 if self._backend.device.type == "cpu" else 1)
        attention = CpuAttention(max(1, threads))
        account.charge(Tier.HOST, nbytes, "a test of attention")
        try:
            written = self._backend.reserve(nbytes).fill_(1).view(form.cells)
            pool = PagedKV.of(written, layer, policy.page_tokens, form)
            return measured_speed(attention, pool, layer).bytes_per_second
        finally:
            attention.close()
            account.refund(Tier.HOST, nbytes)
