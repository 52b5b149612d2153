"""Everything a loaded model consists of, put together under its budgets."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from flexrun.architecture_check import ensure_exact
from flexrun.attention.torch_ops import TorchAttention
from flexrun.attention.triton_attention import TritonAttention, usable
from flexrun.attention_split import AttentionSplit
from flexrun.calibration import measured_hardware, tune
from flexrun.chosen_bits import with_chosen_bits
from flexrun.executor import Executor
from flexrun.foresight import Foresight
from flexrun.kv_setup import open_kv
from flexrun.loading import load_weights
from flexrun.machine import choose_types, offload_directory, open_backend
from flexrun.model import build_model, load_config, stored_type
from flexrun.model_files import resolve_model
from flexrun.model_plan import ModelPlanner
from flexrun.planning_speeds import PlanningSpeeds
from flexrun.runtime_text import placement_text, prediction_text
from offload.activations import ActivationStore
from offload.checkpoint import Checkpoint
from offload.errors import DeviceMemoryError
from offload.links import Link
from offload.raw_speed import raw_speeds
from offload.tiers import Tier
from offload.timeline import COMPUTE, Timeline
from offload.transfer_engine import TransferEngine
from policy_search.bits import CHOSEN
from policy_search.hardware import Hardware
from policy_search.memory import parked_rows, smallest_relay, workspace
from policy_search.sweep_load import RESOURCES

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Mapping, Sequence

    from flexrun.attention.interface import AttentionBackend
    from flexrun.calibration import RowBudget
    from flexrun.config import EngineConfig
    from flexrun.disk_weights import DiskPlan
    from flexrun.loading import LoadedWeights
    from flexrun.model_weights import ModelWeights
    from flexrun.plan import SweepPlan
    from policy_search.workload import JobLengths

logger = logging.getLogger(__name__)


class Runtime:
    """A model with its weights, KV cache, scheduler and executor; closed by the given stack."""

    def __init__(
        self,
        config: EngineConfig,
        closing: contextlib.ExitStack,
        on_bits: Callable[[dict[str, Any]], None] = lambda bits: None,
    ) -> None:
        """`on_bits` is told the bits that the plan has chosen, if it may choose any."""
        self.directory = resolve_model(config.model)
        hf_config = load_config(self.directory)
        ensure_exact(hf_config)
        self.backend = open_backend(config)
        closing.callback(self.backend.close)
        stored = stored_type(self.directory, hf_config)
        self.stored, self.dtype = choose_types(config.dtype, stored, self.backend.device)
        self.model = build_model(hf_config, self.dtype, self.backend.device, self.stored)
        checkpoint = Checkpoint(
            self.directory, self.model.module, self.stored, self.model.stored_dtypes
        )
        self._offload_directory = offload_directory(config)
        machine = self.dtype, self.backend, self._offload_directory
        self._speeds = PlanningSpeeds(*machine, config.emulate, hf_config)
        planner = ModelPlanner(self.model, checkpoint, *machine, self._speeds)
        given, (config, self.bits) = config, with_chosen_bits(config, planner)
        if given.free_bits:
            on_bits({name: getattr(config, name) for name in CHOSEN})
        self._plan = planner.plan(config)
        weights, disk, self.shape, self.policy, *_ = self._plan
        cost = self._plan.cost
        self.foresight = None if cost is None else Foresight(cost)
        self._finds_row_budget = config.max_rows is None and config.policy is None
        self._expanded = weights.most_expanded
        activations = workspace(self.shape, self.policy)
        account = self.backend.account
        account.charge(Tier.DEVICE, activations, "working memory for activations")
        closing.callback(account.refund, Tier.DEVICE, activations)
        self.timeline = Timeline(self.backend, traced=config.trace is not None)
        self.transfers = TransferEngine(self.backend, self.timeline)
        closing.callback(self.transfers.close)
        self.weights = self._load(weights, checkpoint, disk)
        closing.callback(self.weights.close)
        self.activations = self._add_activations(closing)
        kv = self.model, self.dtype, self.shape, self.policy, self.backend, self.transfers
        self.pools, self.kv_cache, self.scheduler = open_kv(*kv, self._offload_directory, closing)
        self._warn_of_long_requests(config.job_lengths)
        self._split = AttentionSplit(
            self.policy,
            self.shape,
            self.model.attention[0],
            self.kv_cache,
            self.scheduler,
            self.backend,
            self.transfers,
        )
        closing.callback(self._split.close)
        # The last to be registered is the first to be called: nothing may still be on its way
        # when the memory it reads or writes is given back.
        closing.callback(self.transfers.close)
        self.raw_speeds: dict[Link, float] = {}
        self._budget: RowBudget | None = None
        self._executor = self._make_executor(closing)

    def _warn_of_long_requests(self, job: JobLengths | None) -> None:
        """Each of them will say so, but hours later."""
        longest = min(self.model.context_length, job.longest_sequence if job else 0)
        if not self.pools.fits_ever(longest):
            logger.warning(
                "the KV cache has no room for one sequence of %d tokens, as the job may have: such "
                "requests will fail (raise the memory budgets, or give --weights or --kv-cache a "
                "smaller share on the device)",
                longest,
            )

    def _make_executor(self, closing: contextlib.ExitStack) -> Executor:
        return Executor(
            self.model,
            self.weights.store,
            self.kv_cache,
            self._choose_attention(closing),
            self.backend,
            self.timeline,
            self.activations,
            embedding=self.weights.embedding,
            overlap=self.policy.overlap,
            depth=self.policy.depth,
            host_attention=self._split.host,
            two_bound=not self.shape.expanded_bytes,
            filled_rows=self.policy.micro_batch_rows if self._compiles_per_row_count() else 0,
        )

    def _load(self, weights: ModelWeights, checkpoint: Checkpoint, disk: DiskPlan) -> LoadedWeights:
        return load_weights(
            self.model,
            weights,
            checkpoint,
            self.policy.weights,
            self.backend,
            self.transfers,
            disk,
            self.policy.depth,
            self.policy.max_rows,
            smallest_relay(self.policy),
        )

    def _compiles_per_row_count(self) -> bool:
        return self.backend.device.type == "cpu" and self.dtype != torch.float32

    def _choose_attention(self, closing: contextlib.ExitStack) -> AttentionBackend:
        if self.backend.device.type != "cpu":
            where = self.policy.page_tokens, self.backend.device
            found = usable(set(self.model.attention), self.dtype, *where, self.kv_cache.format)
            return TritonAttention() if found else TorchAttention()
        from flexrun.attention.cpu import CpuAttention  # Numba takes a while to import

        attention = CpuAttention()
        closing.callback(attention.close)
        attention.compile(self.kv_cache.format)
        return attention

    def _add_activations(self, closing: contextlib.ExitStack) -> ActivationStore:
        policy, row_bytes = self.policy, self.shape.hidden_size * self.shape.value_bytes
        store = ActivationStore(
            policy.activations, parked_rows(policy), row_bytes, self.backend, self.transfers
        )
        closing.callback(store.close)
        return store

    def measure_links(self) -> None:
        """Find out what device and links can do, before they have anything else to do."""
        with torch.inference_mode():
            if self.backend.device.type == "cuda":
                rows = self.policy.micro_batch_rows, self.policy.logit_rows
                self.weights.store.measure_products(*rows)
            self.raw_speeds = raw_speeds(self.backend, self.weights.store.raw_copies())
            link = self.raw_speeds.get(Link.HOST_TO_DEVICE)
            self._split.measure(link, self.weights.store.streamed_bytes)
            hardware = self._measure(self.raw_speeds)
            cost = None if self.foresight is None else self.foresight.cost
            known = self.scheduler, self.policy, self.shape, hardware, self.weights.store, cost
            self._budget = tune(*known, prompts=self._finds_row_budget)

    def _measure(self, speeds: Mapping[Link, float]) -> Hardware:
        """What decides about rows that are free, and about pages that move away."""
        if not self.weights.store.streamed_bytes and self.pools.swap is None:
            return Hardware(host_to_device=math.inf)
        swap = raw_speeds(self.backend, self.kv_cache.swap_copies())
        free = workspace(self.shape, self.policy)
        known = self.backend, self.dtype, self.shape, speeds, swap, free
        return measured_hardware(*known, self._expanded)

    def run(
        self,
        plan: SweepPlan,
        tokens: Mapping[int, Sequence[int]],
        choose: Callable[[list[int], torch.Tensor], torch.Tensor],
    ) -> dict[int, list[int]]:
        """One sweep: the next token of every sequence that wants one, and of guessed ones."""
        before = self.weights.store.expanded_bytes
        try:
            with torch.inference_mode():
                chosen = self._executor.run(plan, tokens, choose)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"the device ran out of memory in a sweep of {plan.rows} rows: {error}",
                hint="lower --micro-batch, --max-rows or --device-memory",
            ) from error
        self.weights.store.check_files()  # before anything that was read from them counts
        if self.foresight is not None:
            self.foresight.add(plan.spans)
        if self._budget is not None:
            busy, counters = self.timeline.busy_seconds, self.transfers.counters
            arriving = [busy(str(link)) for link in self.raw_speeds]
            alone = [counters[link].total_bytes / v for link, v in self.raw_speeds.items()]
            self._budget.learn(
                plan.rows, busy(COMPUTE), arriving, alone, self._expanded_since(before)
            )
        return chosen

    def _expanded_since(self, before: int) -> float:
        """In this sweep, the share of what a full one expands; 1 if that is nothing."""
        expanded, most = self.weights.store.expanded_bytes - before, self.shape.expanded_in_sweep
        return expanded / most if most else 1.0

    def describe(self) -> str:
        """What lives where, and what that is predicted to do, in a few lines."""
        lines = [placement_text(self)]
        if self._plan.prediction is not None:
            lines.append(prediction_text(self._plan.prediction, self._plan.job))
        return "\n".join([*lines, *([self.bits.text] if self.bits is not None else [])])

    def learn(self, seconds: float) -> None:
        """The run is over, after `seconds` of sweeps: what was predicted wrong is corrected."""
        if self.foresight is not None and self.policy.overlap:
            lesson = self.foresight.lesson(self._busy_seconds(), seconds)
            self._speeds.learn(self.shape, *lesson)

    def foreseen(self, seconds: float) -> dict[str, Any]:
        """Predicted and measured seconds; nothing where speeds are not known, or nothing ran."""
        if self.foresight is None or not self.foresight.seconds:
            return {}
        return {"predicted": self.foresight.report(self._busy_seconds(), seconds)}

    def _busy_seconds(self) -> dict[str, float]:
        """Of each resource, as the cost model calls them."""
        return {name: self.timeline.busy_seconds(name) for name in RESOURCES}
