"""Some of a model's layers run, and what all of them are said to take."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from flexrun.disk_weights import plan_disk
from flexrun.layer_run import LayerRun
from flexrun.loading import model_shape
from flexrun.model import build_model
from flexrun.model_profile import Profiler, measured_profile
from flexrun.model_weights import find_weights
from flexrun.plan import MicroBatch, RowSpan, SweepPlan
from flexrun.timed_sweep import Timed, timed
from flexrun.twin_config import few_layers
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.errors import CapacityError, OffloadStoreError
from offload.tiers import MemoryAccount, Tier
from offload.timeline import Interval
from policy_search.model_profile import profile_key

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "bos_token_id": 500,
    "eos_token_id": 501,
}
LLAMA = LlamaConfig(num_hidden_layers=6, **SIZES)
MIXED = Qwen3MoeConfig(
    num_hidden_layers=7,
    decoder_sparse_step=1,
    mlp_only_layers=[0, 3],
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    head_dim=16,
    **SIZES,
)


class _Nowhere:
    """Where weights would be if there were any."""

    def load(self, names):
        raise AssertionError("nothing is loaded")

    def fingerprint(self):
        return b"nowhere"

    def in_place(self, names):
        return None

    def check_unchanged(self):
        return None


def shape_of(config, dtype=torch.float32):
    model = build_model(config, dtype, torch.device("cpu"))
    weights = find_weights(model)
    disk = plan_disk(_Nowhere(), weights.units, Path("/nowhere"))
    return model_shape(model, weights, dtype, disk)


@pytest.fixture(params=["cpu", "emulated"])
def backend(request):
    account = MemoryAccount(dict.fromkeys(Tier, 64 << 20))
    made: DeviceBackend
    if request.param == "cpu":
        made = CpuBackend(account)
    else:
        made = EmulatedBackend(account, EmulatedMachine())
    yield made
    made.close()


def test_layers_stand_for_all_of_their_kind():
    """As many as were asked for, of each kind; together they stand for the whole model."""
    small, counts = few_layers(LLAMA, 4, whole_head=True)
    assert (small.num_hidden_layers, counts) == (4, [1.5] * 4)
    assert small.vocab_size == LLAMA.vocab_size
    assert few_layers(LLAMA, 1, whole_head=True)[1] == [6.0]
    small, counts = few_layers(MIXED, 2, whole_head=False)
    assert counts == [1.0, 2.5, 2.5, 1.0]  # dense, with experts, with experts, dense
    assert (small.mlp_only_layers, small.hidden_size) == ([0, 3], 64)
    assert small.eos_token_id < small.vocab_size < LLAMA.vocab_size


@pytest.mark.parametrize("config", [LLAMA, MIXED], ids=["llama", "mixed"])
def test_a_model_is_measured_and_nothing_stays(backend, tmp_path, config):
    """Rising rows that take no less time, and all budgets as they were."""
    before = {tier: backend.account.available(tier) for tier in Tier}
    shape = shape_of(config)
    profile = measured_profile(config, shape, torch.float32, backend, tmp_path, 0.5)
    rows = [n for n, _ in profile.layers]
    assert rows[:5] == [1, 4, 16, 32, 64]
    assert rows == sorted(rows)
    seconds = [s for _, s in profile.layers]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert [n for n, _ in profile.head] == [1, 4, 16, 32, 64]
    assert 0 <= profile.compute_lost < 1
    assert 0 <= profile.link_lost < 1
    assert {tier: backend.account.available(tier) for tier in Tier} == before
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_a_layer_nothing_is_measured(tmp_path):
    """The machine's own speeds have to do; nothing stays charged."""
    account = MemoryAccount(dict.fromkeys(Tier, 200_000))
    backend = CpuBackend(account)
    with pytest.raises(CapacityError, match="a measurement of the machine needs"):
        measured_profile(LLAMA, shape_of(LLAMA), torch.float32, backend, tmp_path)
    assert account.used == dict.fromkeys(Tier, 0)
    backend.close()


def test_models_of_few_positions_are_not_measured_beyond_them(tmp_path):
    """A table of positions ends where the model's context does; a very short one is refused."""
    backend = CpuBackend(MemoryAccount(dict.fromkeys(Tier, 64 << 20)))
    for positions, context in ((256, 128), (1024, 512)):
        sizes = SIZES | {"max_position_embeddings": positions, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes)
        with contextlib.ExitStack() as closing:
            run = LayerRun(config, shape_of(config), torch.float32, backend, (2, 512), closing)
            assert run.context == context
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 150, "num_hidden_layers": 2})
    with pytest.raises(CapacityError, match="too short"), contextlib.ExitStack() as closing:
        LayerRun(config, shape_of(config), torch.float32, backend, (2, 512), closing)
    backend.close()


def test_without_a_disk_the_rest_is_measured(tmp_path, monkeypatch, caplog):
    """What links and layers lose to each other needs a file on a CPU."""
    backend = CpuBackend(MemoryAccount(dict.fromkeys(Tier, 64 << 20)))

    def fail(*_):
        raise OffloadStoreError("no space left", hint="none")

    monkeypatch.setattr("flexrun.link_calibration.LinkCalibration._make_file", fail)
    found = measured_profile(LLAMA, shape_of(LLAMA), torch.float32, backend, tmp_path, 0.2)
    assert (found.compute_lost, found.link_lost) == (0.0, 0.0)
    assert found.layers
    assert "is not known: no space left" in caplog.text
    assert backend.account.used == dict.fromkeys(Tier, 0)
    backend.close()


def test_rows_visit_different_experts(backend):
    """As the tokens of a job do: rows that are alike would read as few matrices as one."""
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = LayerRun(MIXED, shape_of(MIXED), torch.float32, backend, (2, 32), closing)
        visited: list[int] = []
        layers: list[Any] = run.model.layers
        layer = next(each for each in layers if hasattr(each.mlp, "gate"))

        def note(module, args, output):
            logits = output[0] if isinstance(output, tuple) else output
            visited.extend(logits.float().topk(2).indices.flatten().tolist())

        handle = layer.mlp.gate.register_forward_hook(note)
        run.generating(32, 1, 1)
        handle.remove()
        assert len(set(visited[-64:])) == 4


def test_sweeps_are_what_was_asked_for(backend):
    """Rows and positions of those that generate, and of prompts."""
    shape = shape_of(LLAMA)
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = LayerRun(LLAMA, shape, torch.float32, backend, (4, 64), closing)
        generating = run.generating(3, 40, 1)
        assert (generating.rows, generating.read, generating.positions) == (3, 3 * 41, 0)
        prompts = run.prompts(2, 64, 1)
        assert (prompts.rows, prompts.read) == (128, 0)
        assert prompts.positions == 2 * sum(range(1, 65))
        assert not run.scheduler.running
        assert prompts.seconds > 0
        assert prompts.whole > prompts.seconds + prompts.head


def test_a_layer_counts_as_often_as_the_model_has_it():
    """What the clock says of each unit, times the layers that it stands for; the head apart."""
    counts, at = [1.0, 2.5, 2.5, 1.0], 100.0
    intervals = [Interval("compute", "start of micro-batch 0", at, at + 0.5, 0)]
    for unit in range(5):
        begin = at + 10 * (unit + 1)
        intervals.append(Interval("compute", "weights", begin - 1, begin - 0.75, 0))
        name = f"unit {unit}, micro-batch 0"
        intervals.append(Interval("compute", name, begin, begin + 2**unit / 4, 0))
    intervals.append(Interval("sampling", "sampling", at + 60, at + 61, 0))
    spans = (RowSpan(0, 4, 1, True), RowSpan(1, 6, 3, True))
    found = timed(SweepPlan((MicroBatch(spans),)), intervals, counts, wall=70.0)
    layers = 0.25 + 2.5 * 0.5 + 2.5 * 1.0 + 2.0
    assert found.seconds == pytest.approx(0.5 + layers + 5 * 0.25 * 7 / 4)
    assert found.head == 4.0
    inside, computing = 50 + 4.0, 0.5 + 5 * 0.25 + 31 / 4
    assert found.program == pytest.approx((inside - computing) * 7 / 4)
    assert found.around == pytest.approx(70 - inside)
    assert (found.rows, found.read, found.positions) == (4, 5, 7 + 8 + 9)


class Clock:
    """A run whose sweeps take what a formula says."""

    context, sequences_at_once, prompt_rows, whole_head = 512, 8, [128, 256, 1024], True

    def __init__(self, read: float, attend: float) -> None:
        self.read, self.attend, self.packed = read, attend, 1.0

    def pack(self):
        self.packed = 0.5
        return True

    def timed(self, rows, read, positions):
        seconds = self.packed * (2.0 + rows / 8) + read * self.read + positions * self.attend
        return Timed(rows, read, positions, seconds, 0.5 + rows / 64, 0.25, 0.125, 0.001)

    def generating(self, count, context, repeats):
        return self.timed(count, count * (context + repeats), 0)

    def prompts(self, count, length, repeats):
        return self.timed(count * length, 0, count * length * (length + 1) // 2)


def profiler(read: float, attend: float, seconds: float) -> Profiler:
    run: Any = Clock(read, attend)
    return Profiler(run, shape_of(LLAMA), seconds)


def test_operators_are_told_apart():
    """From a clock that is known, what it is made of."""
    shape = shape_of(LLAMA)
    kv, flops = sum(shape.kv_rows), shape.attention_flops
    found = profiler(2e-3, 1e-3, 1e9).profile()
    assert found.device_attention == pytest.approx(kv / 2e-3, rel=0.02)
    assert found.attention_flops == pytest.approx(flops / 1e-3)
    assert [rows for rows, _ in found.layers] == [1, 4, 16, 32, 64, 128, 256, 1024]
    for rows, seconds in found.layers:
        own = 2e-3 * rows * 6 if rows <= 64 else 0.0  # the few positions of single rows
        assert seconds == pytest.approx(2 + rows / 8 + own)
    assert dict(found.in_place)[1024] == pytest.approx(0.5 * (2 + 1024 / 8))
    assert found.head == tuple((n, 0.5 + n / 64) for n in (1, 4, 16, 32, 64))
    assert (found.program, found.around) == (0.25, 0.125)


def test_noise_is_no_speed():
    """Where attention takes next to nothing, the machine's speeds stand."""
    found = profiler(1e-9, 1e-9, 1e9).profile()
    assert found.device_attention == found.attention_flops == math.inf


def test_with_little_time_one_size_of_prompts_is_measured():
    """Never none: what many rows take would be guessed from few."""
    found = profiler(0.0, 0.0, 0.0).profile()
    assert [rows for rows, _ in found.layers][-2:] == [64, 128]


def test_bits_do_not_change_a_models_profile():
    """The same layers are computed, however they are stored; another width is another model."""
    wider = LlamaConfig(num_hidden_layers=6, **SIZES | {"intermediate_size": 192})
    assert profile_key(shape_of(LLAMA)) != profile_key(shape_of(wider))
    assert profile_key(shape_of(LLAMA)) != profile_key(shape_of(LLAMA, torch.bfloat16))
