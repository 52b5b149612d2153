"""Run a random twin through the engine's own parts and compare it with transformers' forward."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexrun.attention.torch_ops import TorchAttention
from flexrun.disk_weights import plan_disk
from flexrun.executor import Executor
from flexrun.loading import load_weights
from flexrun.model import build_model
from flexrun.model_weights import find_weights
from flexrun.schedulers import ContinuousScheduler
from offload.activations import ActivationStore
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.kv_cache import KVCache
from offload.pages import PagePools
from offload.tiers import MemoryAccount, Split, Tier
from offload.timeline import Timeline
from offload.transfer_engine import TransferEngine

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from transformers import PreTrainedModel

    from flexrun.model import Model

LENGTHS = (3, 33, 12, 25, 1, 18)
"""Prompt lengths: ragged, some far beyond the twin's sliding window."""
NEW_TOKENS = 12
TOLERANCE = 1e-4
"""Of the largest logit: float32 rounding stays far below it, wrong attention far above."""
PAGE_TOKENS = 4


class _StateDict:
    """A model in memory, read like a checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = model.state_dict()

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, self._tensors[name]

    def in_place(self, names: Collection[str]) -> None:
        return None  # so the twin also proves the prepared store

    def fingerprint(self) -> bytes:
        return b"twin"

    def check_unchanged(self) -> None:
        return None


class TwinRun:
    """The engine around a twin: two micro-batches, small pages, weights and KV on several tiers."""

    def __init__(self, twin: PreTrainedModel, closing: contextlib.ExitStack) -> None:
        self.model: Model = build_model(twin.config, torch.float32, torch.device("cpu"))
        backend = EmulatedBackend(MemoryAccount(), EmulatedMachine())
        closing.callback(backend.close)
        timeline = Timeline(backend)
        transfers = TransferEngine(backend, timeline)
        closing.callback(transfers.close)
        directory = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="flexrun-")))
        found, source = find_weights(self.model), _StateDict(twin)
        weights = load_weights(
            self.model,
            found,
            source,
            Split(device=30, host=40, disk=30),
            backend,
            transfers,
            plan_disk(source, found.units, directory),
            depth=3,
            max_rows=40,
        )
        closing.callback(weights.close)
        pools = PagePools({Tier.DEVICE: 64, Tier.HOST: 64}, PAGE_TOKENS, {Tier.HOST: 32})
        kv_cache = KVCache(self.model.attention, torch.float32, pools, backend, transfers, 32)
        closing.callback(kv_cache.close)
        hidden = twin.config.get_text_config().hidden_size
        activations = ActivationStore(Split(host=100), 40, hidden * 4, backend, transfers)
        self.scheduler = ContinuousScheduler(
            pools, max_rows=40, max_sequences=4, micro_batch_rows=20, num_micro_batches=2
        )
        self.executor = Executor(
            self.model,
            weights.store,
            kv_cache,
            TorchAttention(),
            backend,
            timeline,
            activations,
            embedding=weights.embedding,
            depth=3,
            filled_rows=20,
        )

    def forced_logits(self, sequences: list[list[int]]) -> list[torch.Tensor]:
        """Logits of the last NEW_TOKENS positions but one of each sequence, decoded one by one."""
        for number, tokens in enumerate(sequences):
            self.scheduler.add(number, len(tokens) - NEW_TOKENS, len(tokens))
        logits: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(sequences))}

        def choose(numbers: list[int], rows: torch.Tensor) -> torch.Tensor:
            for number, row in zip(numbers, rows):
                logits[number].append(row.clone())
            return torch.zeros(len(numbers), dtype=torch.long)

        while not (plan := self.scheduler.next_sweep()).empty:
            chosen = self.executor.run(plan, dict(enumerate(sequences)), choose)
            self.scheduler.commit(plan)
            for number in chosen:
                if len(logits[number]) == NEW_TOKENS:
                    self.scheduler.finish(number)
        return [torch.stack(rows) for rows in logits.values()]


def compare_with_twin(twin: PreTrainedModel) -> str | None:
    """None if the engine gives `twin`'s logits; otherwise where they first differ."""
    vocab = twin.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(3, vocab, (length + NEW_TOKENS,), generator=draw).tolist()
        for length in LENGTHS
    ]
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = TwinRun(twin, closing)
        ours = run.forced_logits(sequences)
        for tokens, rows in zip(sequences, ours):
            expected = twin(torch.tensor([tokens]), use_cache=False).logits[0]
            expected = expected[-NEW_TOKENS - 1 : -1]
            error = (rows - expected).abs().amax(-1) / expected.abs().max()
            bad = [i for i, e in enumerate(error.tolist()) if not e <= TOLERANCE]
            if bad:
                position = len(tokens) - NEW_TOKENS - 1 + bad[0]
                where = _first_layer(run, twin, tokens)
                return (
                    f"logits differ from transformers' by {error[bad[0]]:.2g} of the largest, "
                    f"first at position {position} of a sequence of {len(tokens)}, {where}"
                )
    return None


def _first_layer(run: TwinRun, twin: PreTrainedModel, tokens: list[int]) -> str:
    """The first decoder layer whose output is wrong when `tokens` are one prompt."""
    outputs: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def keep(key: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[key].append(hidden.reshape(-1, hidden.shape[-1]).clone())

        return hook

    names = {id(module): name for name, module in run.model.module.named_modules()}
    theirs = [twin.get_submodule(names[id(layer)]) for layer in run.model.layers]
    prompt = tokens[:20]  # rows of one micro-batch
    for layer, other in zip(run.model.layers, theirs):
        layer.register_forward_hook(keep("ours"))
        other.register_forward_hook(keep("theirs"))
    twin(torch.tensor([prompt]), use_cache=False)
    number = -1
    run.scheduler.add(number, len(prompt), len(prompt) + 1)
    plan = run.scheduler.next_sweep()
    run.executor.run(plan, {number: prompt}, lambda numbers, rows: rows.argmax(-1))
    for index, (a, b) in enumerate(zip(outputs["ours"], outputs["theirs"])):
        if not (a - b).abs().max() <= TOLERANCE * b.abs().max():
            return f"from layer {index} on, already in one prompt"
    return "not within one prompt: it depends on earlier sweeps (state, or positions)"
